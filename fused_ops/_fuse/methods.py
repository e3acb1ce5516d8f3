"""Which functions of a module's class fuse reads: forward and what it reaches, each parsed once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .flow import Flow
from .sites import Site, sites
from .source import Source, SourceError, read, undecorated

_TORCH_LAYERS = frozenset((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))


@dataclass(frozen=True)
class Parsed:
    """A function with its possible sites."""

    source: Source
    flow: Flow
    sites: tuple[Site, ...]


class OwnClassError(SourceError):
    """A method asks for its module's class: another method of it fused would be seen there too."""


@functools.lru_cache(maxsize=1024)
def parsed(function: FunctionType) -> Parsed | SourceError:
    """The function's source and sites, or why they cannot be had."""
    try:
        source = read(function)
    except SourceError as error:
        return error
    flow = Flow(source.tree)
    if flow.looks_into_frames:
        return SourceError("looks at its variables by locals(), eval() or a frame, which a rewritten source would have more of")
    if flow.asks_own_class:
        return OwnClassError("asks for the class of its module (type(self)), which fuse would change")
    return Parsed(source, flow, tuple(sites(flow)))


def reached(cls: type[nn.Module]) -> dict[str, Any]:
    """{name: function} of forward and of the methods that it names, and those they name: the class's own, not torch's."""
    found: dict[str, Any] = {}
    pending = ["forward"]
    while pending:
        name = pending.pop()
        owner = next((c for c in cls.__mro__ if name in vars(c)), None)
        if name in found or owner is None or not _is_users(owner):
            continue
        function = vars(owner)[name]
        try:
            code = undecorated(function).__code__
        except SourceError:
            if name == "forward":
                found[name] = function
            continue
        found[name] = function
        pending += sorted(names_in(code) - found.keys())
    return found


def asking_own_class(functions: dict[str, Any]) -> tuple[str, SourceError] | None:
    """The method among functions that asks for its module's class, with what is said of it."""
    for name, function in functions.items():
        try:
            inner = undecorated(function)
        except SourceError:
            continue
        if not {"type", "__class__"}.isdisjoint(names_in(inner.__code__)) and isinstance(found := parsed(inner), OwnClassError):
            return name, found
    return None


def _is_users(owner: type) -> bool:
    """Whether a class is read: torch's own are known, but for its Transformer layers."""
    return owner in _TORCH_LAYERS or not (owner is nn.Module or owner.__module__.startswith("torch.nn.") or owner is object)


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """The globals and attributes that code and the functions inside it name."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(code.co_names).union(*(names_in(const) for const in inner))


def functions_named(function: FunctionType) -> Iterator[tuple[str, FunctionType]]:
    """The ordinary functions of its file that a function names, as (name, function)."""
    for name in sorted(names_in(function.__code__)):
        value = function.__globals__.get(name)
        if (
            isinstance(value, FunctionType)
            and value is not function
            and value.__module__ not in ("torch.nn.functional", "torch.functional")
        ):
            yield name, value
