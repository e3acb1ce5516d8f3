"""The FLOPs of the raw operators, from the roles of their tensors: for torch.utils.flop_counter and explain()."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .spec import REGISTRY, Raw


def _product(rows: Any, weight: Any) -> int:
    """The FLOPs of a product of rows with a weight, or of its gradient: 2 M N K, as torch counts its own; None is no weight."""
    return 0 if weight is None else 2 * math.prod(rows[:-1]) * math.prod(weight)


def flops(raw: Raw, args: Sequence[Any]) -> int:
    """The FLOPs of one call of a raw operator: those of its products; what is computed an element counts nothing.

    args: the operator's arguments, with shapes in place of tensors.
    """
    roles = raw.roles_of(args)
    weights: dict[str, list[Any]] = {"w": [], "W": []}
    for role, arg in zip(roles.inputs.split(), args):
        if role in weights:
            weights[role].append(arg)
    rows = args[0]
    if raw.forward:
        return sum(_product(rows, weight) for weight in (*weights["w"], *weights["W"]))
    found, inner = 0, False
    left = {role: list(given) for role, given in weights.items()}
    for output in roles.outputs.split():
        role, needed = output[0], not output[1:] or args[int(output[1:])]
        if role in left:  # the gradients of weights are in the weights' order
            weight = left[role].pop(0) if left[role] else None
            found += needed and _product(rows, weight)
        elif role == "x" and needed:
            found += sum(_product(rows, weight) for weight in weights["w"])
        inner |= bool(needed) and role in ("x", "y", "b")
    if inner and "z" in roles.inputs:  # through the second weight to the first product
        found += sum(_product(rows, weight) for weight in weights["W"])
    return found


def flops_of(raw: Raw, args: Sequence[Any]) -> int:
    """The FLOPs of one call of a raw operator with these arguments."""
    return flops(raw, [a.shape if isinstance(a, torch.Tensor) else a for a in args])


@functools.cache
def register_flop_formulas() -> dict[Any, Callable[..., int]]:
    """Register the formulas with torch.utils.flop_counter, once, and return them."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    operators = {raw.overload.overloadpacket: raw for op in REGISTRY.values() for raw in op.raw}
    for packet, raw in operators.items():
        register_flop_formula(packet)(lambda *args, raw=raw, **_: flops(raw, args))
    return {packet: flop_registry[packet] for packet in operators}


def register_when_used() -> None:
    """Register the formulas if torch.utils.flop_counter has been imported.

    Counters that are counting already get them too: each copied the registry when it was made.
    """
    if "torch.utils.flop_counter" in sys.modules and torch._C._len_torch_dispatch_stack():
        formulas = register_flop_formulas()
        for mode in _get_current_dispatch_mode_stack():
            counter: Any = getattr(mode, "counter", None)  # made before the first call: it has the registry of that time
            if hasattr(counter, "flop_registry"):
                counter.flop_registry.update({k: v for k, v in formulas.items() if k not in counter.flop_registry})


register_when_used._dynamo_marked_constant = True  # type: ignore[attr-defined]  # under Dynamo: run while tracing
