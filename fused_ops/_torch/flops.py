"""FLOP formulas of the raw operators, for torch.utils.flop_counter and explain()."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _rows(shape: Any) -> int:
    return math.prod(shape[:-1])


# FLOPs of the products, as torch counts its own: 2 M N K each, and nothing for what is computed an element. Arguments are
# the raw operators', with shapes in place of tensors.
def _linear_fwd(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * weight[0] * weight[1]


def _linear_bwd(dy: Any, x: Any, w: Any, saved: Any, act: str, dx: bool, dw: bool, db: bool, *_: Any, **__: Any) -> int:
    return 0 if w is None else 2 * _rows(dy) * w[0] * w[1] * (dx + dw)


def _gated_fwd(x: Any, w_gate: Any, *_: Any, **__: Any) -> int:
    return 2 * _linear_fwd(x, w_gate)


def _gated_bwd(
    dy: Any, x: Any, wg: Any, wu: Any, g: Any, u: Any, act: str, dx: bool, dwg: bool, dwu: bool, *_: Any, **__: Any
) -> int:  # fmt: skip
    return 2 * _rows(dy) * wg[0] * wg[1] * (2 * dx + dwg + dwu)


def _mlp_fwd(x: Any, w1: Any, b1: Any, w2: Any, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * (w1[0] * w1[1] + w2[0] * w2[1])


def _mlp_bwd(dy: Any, w2: Any, saved: Any, h: Any, act: str, dpre: bool, db1: bool, dw2: bool, *_: Any, **__: Any) -> int:
    return 2 * _rows(dy) * w2[0] * w2[1] * ((dpre or db1) + dw2)


def _nothing(*_: Any, **__: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    "linear_fwd": _linear_fwd, "linear_bwd": _linear_bwd, "gated_linear_fwd": _gated_fwd, "gated_linear_bwd": _gated_bwd,
    "linear_fp8_fwd": _linear_fwd, "mlp_fwd": _mlp_fwd, "mlp_bwd": _mlp_bwd,
}  # fmt: skip


def flops_of(overload: Any, args: tuple[Any, ...]) -> int:
    """The FLOPs of one call of a raw operator, by its formula."""
    formula = FORMULAS.get(overload.overloadpacket.__name__, _nothing)
    return formula(*(a.shape if isinstance(a, torch.Tensor) else a for a in args))


@functools.cache
def register_flop_formulas() -> dict[Any, Callable[..., int]]:
    """Register the formulas with torch.utils.flop_counter, once, and return them."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    from .spec import REGISTRY

    packets = [raw.overload.overloadpacket for op in REGISTRY.values() for raw in op.raw]
    for packet in packets:
        register_flop_formula(packet)(FORMULAS.get(packet.__name__, _nothing))
    return {packet: flop_registry[packet] for packet in packets}


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
