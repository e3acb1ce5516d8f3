"""A result changed in place, as torch lets its own be: no op's result is a view, or shares memory with an argument."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.torch.calls import CALLS, Call


def without_activation(call: Call) -> Call:
    """The call with None for its activation."""
    args = tuple(None if isinstance(a, str) else a for a in call.example.args)
    return replace(call, example=replace(call.example, args=args))


EACH = [pytest.param(call, id=call.name) for call in CALLS] + [
    pytest.param(without_activation(call), id=f"{call.name} alone")
    for call in CALLS
    if any(isinstance(a, str) for a in call.example.args)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("call", EACH)
def test_a_result_changed_in_place(call: Call, dtype: torch.dtype) -> None:
    """With gradients, of which those that read the result raise as torch's do, and without."""
    for batch, middle in ((4, 3), (1, 1)):
        results = []
        for function in (call.ours, call.aten):
            tensors = call.tensors(dtype, requires_grad=True, batch=batch, middle=middle)
            out = function(*tensors)
            with torch.no_grad():
                alone = function(*tensors)
            assert all(alone.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors)
            alone.mul_(2)
            out.mul_(2)
            raised = ""
            try:
                grads = [g.float() for g in torch.autograd.grad(out.sum(), tensors)]
            except RuntimeError as error:
                raised, grads = str(error), []
            assert bool(raised) is ("modified by an inplace operation" in raised)
            results.append((alone.detach().float(), out.detach().float(), *grads))
        tolerance = {"atol": 0.1, "rtol": 0.1} if dtype is torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)
