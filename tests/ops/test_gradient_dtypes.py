"""A gradient is rounded once, to the dtype of what it is of, whatever the dtypes of the other arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.torch.calls import CALLS, Call

NORMS = [call for call in CALLS if "v" in call.letters]  # the ops that take parameters of another dtype than their input's


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", NORMS, ids=lambda call: call.name)
def test_parameters_in_fp32(call: Call, dtype: torch.dtype) -> None:
    """Every gradient is the fp64 one of the same numbers, to the spacing of its own dtype and the error of fp32 sums."""
    leaves = [t.to(dtype if role == "x" else torch.float32) for t, role in zip(call.tensors(), call.letters)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = call.ours(*leaves)
    dy = torch.randn(out.shape).to(out.dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(out, leaves, dy)
    expected: tuple[Tensor, ...] = torch.autograd.grad(call.aten(*exact), exact, dy.double())
    for role, leaf, got, right in zip(call.letters, leaves, grads, expected):
        assert got.dtype is leaf.dtype
        spacing = 0.51 * torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(
            got.double(), right, rtol=spacing + 1e-6, atol=1e-5, msg=lambda text, role=role: f"{role}: {text}"
        )
