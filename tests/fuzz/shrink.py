"""The simplest call that fails alike: each part of a call made simpler in turn, and kept where the failure stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fused_ops.testing import INTERPRET

from .calls import Call, parameters
from .forms import Form

SMALL = (1, 2, 3, 4)  # a size of 0 stays where it was drawn, and comes nowhere else
TRIALS = 40 if INTERPRET else 200


def shrink(call: Call, fails_alike: Callable[[Call], bool], most: int = TRIALS) -> Call:
    """The simplest call that is found within that many trials."""
    trials = 0
    improved = True
    while improved:
        improved = False
        for simpler in _simpler(call):
            trials += 1
            if trials > most:
                return call
            if fails_alike(simpler):
                call, improved = simpler, True
                break
    return call


def _simpler(call: Call) -> Iterator[Call]:
    def changed(**parts: Any) -> Call:
        return dataclasses.replace(call, **parts)

    if call.way not in ("no_grad", "grad"):
        yield changed(way="grad" if call.needs else "no_grad")
    if call.needs:
        yield changed(way="no_grad", needs=())
    for name in call.needs if len(call.needs) > 1 else ():
        yield changed(needs=tuple(n for n in call.needs if n != name))
    for p in parameters(call.op):
        form = call.tensors.get(p.name)
        if p.optional and form is not None and p.name not in call.needs:
            yield changed(tensors=call.tensors | {p.name: None})
    for name, form in call.tensors.items():
        for simpler in _forms(form) if form is not None else ():
            yield changed(tensors=call.tensors | {name: simpler})
    dtypes = {form.dtype for form in call.tensors.values() if form is not None}
    if len(dtypes) == 1 and dtypes != {torch.float32} and all(dtype.is_floating_point for dtype in dtypes):
        single = {name: form and dataclasses.replace(form, dtype=torch.float32) for name, form in call.tensors.items()}
        yield changed(tensors=single)
    for simpler in _forms(call.dy) if call.needs else ():
        yield changed(dy=simpler)
    yield from (changed(lead=lead) for lead in _sizes(call.lead, 0))
    yield from (changed(inner=inner) for inner in _sizes(call.inner, 1))
    for size in SMALL:
        if size < call.n:
            yield changed(n=size)
        if size < call.z:
            yield changed(z=size)
    for p in parameters(call.op):
        simple = {"dim": -1, "shape": "list", "eps": 1e-5, "name": None, "flag": False}.get(p.kind, torch.float32)
        if p.kind != "tensor" and call.options[p.name] != simple and not (p.kind == "dtype" and call.options[p.name] is None):
            yield changed(options=call.options | {p.name: simple})


def _forms(form: Form) -> Iterator[Form]:
    if form.layout != "contiguous":
        yield dataclasses.replace(form, layout="contiguous")
    if form.values not in ("normal", "zero"):
        yield dataclasses.replace(form, values="normal", scale=1.0)
    elif form.scale != 1.0:
        yield dataclasses.replace(form, scale=1.0)


def _sizes(sizes: tuple[int, ...], least: int) -> Iterator[tuple[int, ...]]:
    """With a dimension less, or one of them small."""
    if len(sizes) > least:
        yield from (sizes[:i] + sizes[i + 1 :] for i in range(len(sizes)))
    for i, size in enumerate(sizes):
        yield from (sizes[:i] + (small,) + sizes[i + 1 :] for small in SMALL if small < size)
        if size > 8:
            yield sizes[:i] + (size // 2,) + sizes[i + 1 :]
