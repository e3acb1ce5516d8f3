"""Calls from a seed: shapes, layouts, dtypes, values, arguments, ways, and now and then an argument that is wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from fused_ops import REGISTRY
from fused_ops.ops.linear.activations import ACTIVATIONS
from fused_ops.testing import INTERPRET

from .calls import Call, Parameter, parameters
from .faults import FAULTS, applies
from .forms import FLOATS, HALVES_AND_FLOAT, LAYOUTS, OTHER_REAL, VALUES, Form
from .ways import DIFFERENTIATES, WAYS, module_of

T = TypeVar("T")
SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 509, 1031)
ROWS = (130, 257, 600)  # more than the rows of a block
ELEMENTS = 600 if INTERPRET else 4000  # of a tensor, about
WRONG = 0.25  # of the calls have a wrong argument


class Dice:
    """A generator of one call's choices: that of case k says nothing about that of case k + 1."""

    def __init__(self, seed: int, case: int) -> None:
        self.rng = np.random.default_rng([seed, case])

    def one(self, options: Sequence[T], first: float = 0.0) -> T:
        """One of the options; the first with this probability and more."""
        return options[0] if self.chance(first) else options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def size(self, most: int) -> int:
        if self.chance(0.03):
            return 0
        return self.one([size for size in SIZES if size <= max(most, 1)])


def draw(seed: int, case: int, op: str | None = None) -> Call:
    """The call of that number. op: of this op (another call than without)."""
    dice = Dice(seed, case)
    name = op or dice.one(sorted(REGISTRY))
    drawn = parameters(name)
    call = Call(name, *_sizes(dice, drawn), way=_way(dice, name), scales=int(dice.rng.integers(3)), positional=dice.chance(0.7))
    options = {p.name: _option(dice, p, call) for p in drawn if p.kind != "tensor"}
    if call.way == "module":
        options |= {p.name: None for p in drawn if p.kind == "dtype" and p.optional}
    call = dataclasses.replace(call, options=options)
    call = dataclasses.replace(call, tensors=_forms(dice, drawn, call), dy=_dy(dice))
    if dice.chance(WRONG):
        return _wrong(
            dice, drawn, dataclasses.replace(call, way=dice.one(("no_grad", "grad", "inference", "autocast_bfloat16"), 0.5))
        )
    return _needing(dice, drawn, call)


def misread(dtype: torch.dtype) -> tuple[str, ...]:
    """The kinds of values that Triton's interpreter reads wrongly: fp8's NaN and infinities as numbers, subnormal bf16 as others."""
    return ("special", "infinite") if dtype.itemsize == 1 else ("subnormal",) if dtype is torch.bfloat16 else ()


def _sizes(dice: Dice, drawn: tuple[Parameter, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """(lead, inner, n, z), each tensor of about ELEMENTS at the most."""
    roles, kinds = {p.role for p in drawn}, {p.kind for p in drawn}
    count = dice.one((1, 2, 3)) if "shape" in kinds and dice.chance(0.4) else 1
    if "dim" in kinds and dice.chance(0.05):
        return (), (), 1, 1
    room = min(ELEMENTS, 1031)
    inner: tuple[int, ...] = ()
    for _ in range(count):
        inner = (*inner, dice.size(room // max(math.prod(inner), 1)))
    k = max(math.prod(inner), 1)
    n, z = dice.size(min(2 * ELEMENTS // k, 257)), dice.size(129)
    widest = max(k, n, z) if {"w", "W"} & roles else k
    lead: tuple[int, ...] = ()
    if dice.chance(0.12) and widest <= 33:
        return (dice.one(ROWS),), inner, n, z
    for _ in range(dice.one((0, 1, 1, 2, 3, 4))):
        lead = (*lead, dice.size(ELEMENTS // (widest * max(math.prod(lead), 1))))
    return lead, inner, n, z


def _way(dice: Dice, name: str) -> str:
    op = REGISTRY[name]
    ways = [way for way in WAYS if op.trains or way not in DIFFERENTIATES]
    ways = [way for way in ways if way != "module" or module_of(op)]
    weights = np.array([WAYS[way].weight for way in ways])
    return str(dice.rng.choice(ways, p=weights / weights.sum()))


def _option(dice: Dice, parameter: Parameter, call: Call) -> Any:
    match parameter.kind:
        case "dim":
            rank = max(len(call.lead) + len(call.inner), 1)
            return dice.one((-1, *range(-rank, rank)), 0.4)
        case "shape":
            return dice.one(("list", "tuple", "size", *(["int"] * (len(call.inner) == 1))))
        case "eps":
            return dice.one((1e-5, 1e-3, 1e-12, 0.5, 1, *([None] * parameter.optional)), 0.4)
        case "name":
            return dice.one((None, *(name for name in ACTIVATIONS if name != "none")))
        case "dtype":
            return dice.one((None, *FLOATS), 0.4) if parameter.optional else dice.one(HALVES_AND_FLOAT)
    return dice.chance(0.5)


def _forms(dice: Dice, drawn: tuple[Parameter, ...], call: Call) -> dict[str, Form | None]:
    converts = any(p.kind == "dtype" and p.optional and call.options[p.name] is not None for p in drawn)
    dtype = dice.one(OTHER_REAL) if converts and dice.chance(0.3) else dice.one(FLOATS)
    norm, fixed = any(p.role == "v" for p in drawn), any(p.role == "x" and p.dtype for p in drawn)
    forms: dict[str, Form | None] = {}
    for p in drawn:
        if p.kind != "tensor":
            continue
        if p.optional and dice.chance(0.35):
            forms[p.name] = None
            continue
        own = p.dtype or (dice.one(HALVES_AND_FLOAT) if fixed else dtype)
        if p.role == "v" and dtype is not torch.float64 and dice.chance(0.4):
            own = dice.one(HALVES_AND_FLOAT)
        values = dice.one(("normal", *(VALUES if p.role == "x" else VALUES[1:-1])), 0.8)
        if not own.is_floating_point or p.role == "q" or (INTERPRET and values in misread(own)):
            values = "normal"
        if values == "offset" and own is torch.float16 and not norm:
            values = "normal"  # a square of 300 is beyond fp16, and hidden layers are rounded
        scale = (
            dice.one((1.0, 1e-3, 0.1, 10.0, 10.0 if own.itemsize == 1 or own is torch.float16 else 1e4), 0.7)
            if values == "normal"
            else 1.0
        )
        if p.role in ("w", "W"):
            scale *= max(call.shape_of(p)[1], 1) ** -0.5
        elif values == "large":
            top = torch.finfo(own).max / 16  # in wider types: sums of products are finite, and for a norm sums of squares
            scale = min(top, 1e15 if norm else 1e100 if own is torch.float64 else 1e35)
        layout = dice.one(LAYOUTS, 0.45)
        forms[p.name] = Form(own, layout, values, scale, int(dice.rng.integers(1000)))
    return forms


def _dy(dice: Dice) -> Form:
    values = dice.one(("normal", "infinite", "special", "zero"), 0.8)
    return Form(torch.float32, dice.one(LAYOUTS, 0.4), values, dice.one((1.0, 1e-3, 10.0), 0.7), int(dice.rng.integers(1000)))


def _needing(dice: Dice, drawn: tuple[Parameter, ...], call: Call) -> Call:
    """The call with the tensors that need a gradient, or that a transform is over."""
    if not WAYS[call.way].over:
        return call
    forms = [(p, call.tensors.get(p.name)) for p in drawn]
    able = [p.name for p, form in forms if form is not None and form.dtype in FLOATS]
    if not able:
        return dataclasses.replace(call, way="no_grad")
    needs = tuple(name for name in able if dice.chance(0.7)) or (dice.one(able),)
    return dataclasses.replace(call, needs=needs)


def _wrong(dice: Dice, drawn: tuple[Parameter, ...], call: Call) -> Call:
    parameter = dice.one(drawn)
    faults = [name for name in FAULTS[parameter.kind] if applies(name, parameter, call)]
    call = dataclasses.replace(call, fault=(parameter.name, dice.one(faults)))
    tame = {name: form and dataclasses.replace(form, values="normal", scale=1.0) for name, form in call.tensors.items()}
    listed = {p.name: "list" for p in drawn if p.kind == "shape"}  # torch takes no int
    call = dataclasses.replace(call, tensors=tame, options=call.options | listed)
    able = [name for name, form in tame.items() if form is not None and form.dtype in FLOATS]
    return dataclasses.replace(call, needs=tuple(able[:1]) if call.way == "grad" and call.spec.trains else ())
