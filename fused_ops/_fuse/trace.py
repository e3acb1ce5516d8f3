"""What a module's forward does with its children, as torch.fx graphs in which every child is a leaf.

A forward may branch on a tensor's value or dtype, on self.training and on whether an optional argument is given. Every
branch is followed, so that what holds in all the graphs holds in every call; a forward that cannot be traced that way
raises UntraceableError with the reason.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Proxy, Tracer

from .activations import function_activation

MAX_PATHS = 64


class UntraceableError(Exception):
    """forward is not a fixed graph over its children; the message says where it stopped."""


class Held:
    """Stands in for an activation function that the parent holds as an attribute, so that its calls can be told apart."""

    def __init__(self, attribute: str, function: Any, activation: str, tracer: _PathTracer) -> None:
        self.attribute = attribute
        self.function = function
        self.activation = activation
        self._tracer = tracer
        self.__name__ = f"self_{attribute}"

    def __call__(self, input: Any, *args: Any, **kwargs: Any) -> Proxy:
        return self._tracer.create_proxy("call_function", self, (input, *args), kwargs)


class _PathTracer(Tracer):
    """Follows one path: the answers to the first branches are given, the rest are answered False."""

    def __init__(self, answers: tuple[bool, ...], optional: bool) -> None:
        super().__init__()
        self.answers = list(answers)
        self.asked = 0
        self.optional = optional  # whether optional arguments are given

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: Proxy) -> bool:
        if self.asked == len(self.answers):
            self.answers.append(False)
        self.asked += 1
        return self.answers[self.asked - 1]

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> tuple[Any, Any]:
        positional, named = [], {}
        for p in _parameters(root_fn):
            given = p.default is p.empty or self.optional
            value = self.create_proxy("placeholder", p.name, (), {}) if given else p.default
            if p.kind is p.KEYWORD_ONLY:
                named[p.name] = value
            else:
                positional.append(value)
        return lambda *args: root_fn(*args, **named), [self.root, *positional]


def _parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """The method's arguments, but self, *args and **kwargs."""
    try:
        found = list(inspect.signature(inspect.unwrap(method)).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise UntraceableError(f"{method!r} has no signature") from error
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def paths(parent: nn.Module, entry: str = "forward") -> list[Graph]:
    """The graphs of parent's method entry, one a path, in training and in evaluation."""
    has_optional = any(p.default is not p.empty for p in _parameters(getattr(type(parent), entry)))
    graphs: list[Graph] = []
    for training, optional in itertools.product((False, True), (False, True) if has_optional else (False,)):
        pending: list[tuple[bool, ...]] = [()]
        while pending:
            tracer = _PathTracer(pending.pop(), optional)
            known = len(tracer.answers)
            graphs.append(_trace(tracer, parent, entry, training))
            pending.extend((*tracer.answers[:i], True) for i in range(known, len(tracer.answers)))
            if len(graphs) + len(pending) > MAX_PATHS:
                raise UntraceableError(f"more than {MAX_PATHS} paths through {entry}")
    return graphs


def trace_once(module: nn.Module, training: bool, entry: str = "forward") -> tuple[Graph, bool]:
    """(the graph of a call with required arguments only, whether other calls have another graph).

    Others do when forward asked for a tensor's value.
    """
    tracer = _PathTracer((), optional=False)
    graph = _trace(tracer, module, entry, training)
    for node in graph.nodes:
        if isinstance(node.target, Held):
            node.target = node.target.function
    return graph, bool(tracer.answers)


def _trace(tracer: _PathTracer, parent: nn.Module, entry: str, training: bool) -> Graph:
    tracer.traced_func_name = entry
    with _as_it_was(parent), _finfo_of_proxies():
        parent.training = training
        _stand_in(parent, tracer)
        try:
            return tracer.trace(parent)
        except Exception as error:  # fx, or the forward itself, which does not expect proxies
            raise UntraceableError(str(error).split("\n")[0].strip().rstrip(".") or type(error).__name__) from error


@contextmanager
def _finfo_of_proxies() -> Iterator[None]:
    """Let torch.finfo take a traced dtype, as forwards that clamp fp16 ask: its limits are constants, no edge of the graph."""
    real = torch.finfo

    def finfo(dtype: Any = None) -> Any:
        return real(torch.float16 if isinstance(dtype, Proxy) else dtype or torch.get_default_dtype())

    torch.finfo = finfo  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.finfo = real  # type: ignore[misc]


def _stand_in(parent: nn.Module, tracer: _PathTracer) -> None:
    for name, value in list(parent.__dict__.items()):
        if not isinstance(value, nn.Module) and (activation := function_activation(value)) is not None:
            parent.__dict__[name] = Held(name, value, activation, tracer)


@contextmanager
def _as_it_was(parent: nn.Module) -> Iterator[None]:
    """Take back at the end whatever forward writes on parent while it is traced."""
    before = dict(parent.__dict__)
    tables = {name: dict(before[name]) for name in ("_parameters", "_buffers", "_modules")}
    try:
        yield
    finally:
        parent.__dict__.clear()
        parent.__dict__.update(before)
        for name, table in tables.items():
            before[name].clear()
            before[name].update(table)
