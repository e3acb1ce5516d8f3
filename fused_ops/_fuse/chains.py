"""Modules called one after the other: neighbours that one call fuses, looked for anew at each call."""

from __future__ import annotations

from typing import Any

from torch import nn

from .activations import activation_of
from .calls import Step, is_idle, is_linear, linear_act, mlp

Modules = tuple[Any, ...]


def chain(modules: Any, x: Any, ops: frozenset[str], left: tuple[nn.Module, ...] = ()) -> Any:
    """`for module in modules: x = module(x)`, and x. left: the Linears that are not to be fused."""
    if not isinstance(modules, (nn.Module, list, tuple)):  # an iterator, say, whose next item may depend on the last
        for module in modules:
            x = module(x)
        return x
    every: Modules = tuple(modules)  # type: ignore[arg-type]
    place = 0
    while place < len(every):
        place, x = _step(every, place, x, ops, left)
    return x


def _step(modules: Modules, place: int, x: Any, ops: frozenset[str], left: tuple[nn.Module, ...]) -> tuple[int, Any]:
    """(the place after what was computed, its result): one module, or those that one call fuses."""
    first = modules[place]
    if not fusable(modules, place, left):
        return place + 1, first(x)
    activation: Step = (modules[place + 1], (), {})
    end = second_half(modules, place, left) if "mlp" in ops else None
    if end is not None:
        between: tuple[Step, ...] = tuple((module, (), {}) for module in modules[place + 2 : end])
        return end + 1, mlp(modules[end], between, activation, first, x, "linear" in ops)
    if "linear" in ops:
        return place + 2, linear_act(modules[place + 1], first, x)
    return place + 1, first(x)


def fusable(modules: Modules, place: int, left: tuple[nn.Module, ...]) -> bool:
    """Whether a Linear at place is followed by an activation that it can apply."""
    if place + 1 >= len(modules):
        return False
    first, second = modules[place], modules[place + 1]
    return is_linear(first) and activation_of(second) is not None and not any(first is module for module in left)


def second_half(modules: Modules, place: int, left: tuple[nn.Module, ...]) -> int | None:
    """Where the second Linear of an MLP that begins at place stands, if no activation follows it."""
    end = place + 2
    while end < len(modules) and is_idle((modules[end], (), {})):
        end += 1
    if end >= len(modules) or not is_linear(modules[end]) or any(modules[end] is module for module in left):
        return None
    return None if fusable(modules, end, left) else end
