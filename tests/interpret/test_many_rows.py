"""More rows than one step of any loop over them takes: a tile too few, too many or twice shows in a gradient."""

from __future__ import annotations

import pytest
import torch

from fused_ops._runtime import device
from fused_ops._runtime.rows import column_sum, column_sums
from fused_ops.testing import ContractMode, forget_plans
from tests.torch.calls import Call, each_call


@each_call
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_backward(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one SM 150 rows are more than a program of a backward takes in one step, and more tiles than programs."""
    monkeypatch.setattr(device, "INTERPRETER_SMS", 1)
    forget_plans()
    leaves = call.tensors(requires_grad=True, batch=50)
    with ContractMode() as mode:
        out = call.ours(*leaves)
        out.backward(torch.randn(out.shape[::-1]).permute(2, 1, 0))
    assert len(mode.checked) >= 2
    assert all(leaf.grad is not None for leaf in leaves)
    forget_plans()


@pytest.mark.parametrize("P", [1, 63, 64, 65, 130])
@pytest.mark.usefixtures("poisoned_memory")
def test_sums_over_partial_rows(P: int) -> None:
    parts = torch.randn(2, P, 45)
    expected = parts.double().sum(1)
    torch.testing.assert_close(column_sum(parts[1], torch.float32).double(), expected[1], rtol=1e-5, atol=1e-5)
    wide = torch.randn(P, 64)[:, :45]  # rows further apart than they are long
    torch.testing.assert_close(column_sum(wide, torch.float32), wide.sum(0), rtol=1e-5, atol=1e-5)
    first, second = column_sums(parts, torch.float32, torch.float16)
    torch.testing.assert_close(first.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.double(), expected[1], rtol=2e-3, atol=2e-3)
    assert second.dtype is torch.float16
