"""Operands, biases and scales that each have strides of their own: one that is taken for another's shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_ops import fused_gated_linear, fused_linear, fused_linear_fp8
from fused_ops.ops.linear.matmul_plan import forced_config
from fused_ops.testing import ContractMode
from tests.interpret.test_linear_variants import CONFIGS


def _apart(size: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """size positive numbers, step apart in memory."""
    return (torch.rand(size * step) + 0.5).to(dtype)[::step]


def _rows(M: int, N: int, more: int) -> Tensor:
    """(M, N) whose rows lie N + more apart, as TMA can describe for multiples of 8."""
    return (torch.randn(M, N + more) * N**-0.5).half()[:, :N]


@pytest.mark.parametrize("name", ["tma_2_subtiles", "split_k", "pointer"])
def test_scales_and_bias_of_an_fp8_linear(name: str) -> None:
    x, w = (torch.randn(n, 48).to(torch.float8_e4m3fn) for n in (40, 56))
    bias = _apart(56, 5, torch.bfloat16)
    one = torch.tensor(0.75)
    for xs, ws in ((_apart(40, 2), one), (one, _apart(56, 3))):
        with forced_config(CONFIGS[name]), ContractMode() as mode:
            fused_linear_fp8(x, w, xs, ws, bias, "gelu")
        assert mode.checked


@pytest.mark.parametrize("name", ["tma_2_subtiles", "pointer"])
@pytest.mark.usefixtures("poisoned_memory")
def test_weights_and_biases_of_a_gated_linear(name: str) -> None:
    x, gate, up = _rows(40, 40, 8), _rows(56, 40, 16), _rows(56, 40, 24)
    biases = _apart(56, 2, torch.float16), _apart(56, 3, torch.float16)
    tensors = [t.detach().requires_grad_() for t in (x, gate, up, *biases)]
    with forced_config(CONFIGS[name]), ContractMode() as mode:
        y = fused_gated_linear(*tensors[:3], "silu", *tensors[3:])
        y.backward(torch.randn(56, 40).half().t())
    assert len(mode.checked) == 2


@pytest.mark.parametrize("name", ["tma_2_subtiles", "split_k", "pointer"])
@pytest.mark.usefixtures("poisoned_memory")
def test_operands_and_bias_of_a_linear(name: str) -> None:
    for x, w in ((_rows(40, 24, 8), _rows(24, 48, 16).t()), (_rows(24, 40, 8).t(), _rows(48, 24, 16))):
        with forced_config(CONFIGS[name]), ContractMode() as mode:
            fused_linear(x, w, _apart(48, 2, torch.float16), "silu")
        assert mode.checked
