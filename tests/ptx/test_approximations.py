"""The contract with the errors that PTX documents of exp2, reciprocal, square root and division: not only with exact ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops import fused_gated_linear, fused_linear
from fused_ops.kernels.linear import activations, linear_bwd
from fused_ops.ops.linear.activations import ACTIVATIONS, SAVES_OUTPUT
from fused_ops.testing import ContractMode

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops.testing.ptx import gpu
from fused_ops.testing.ptx.approximate import errors
from fused_ops.testing.ptx.arithmetic import arithmetic
from fused_ops.testing.ptx.gpu import device
from tests.special_values import DY, PRE

NAMES = [name for name in ACTIVATIONS if name != "none"]
SMOOTH = [name for name in NAMES if name not in (*SAVES_OUTPUT, "relu2")]  # those that compute an exponential
ERRORS = [(ulps, sign) for ulps in (1, 2) for sign in (-1, 0, 1)]
RUNS = [
    pytest.param(ulps, sign, id=f"{ulps}ulp{sign:+d}", marks=() if (ulps, sign) == (2, 1) else (pytest.mark.slow,))
    for ulps, sign in ERRORS
]
SPREADS = (1.0, 2.0, 4.0, 16.0)  # of the pre-activations: tails where a sigmoid is nearly 1, and where it is nearly 0


def pre_activations() -> Tensor:
    """(32, 32) fp32, a quarter of the rows of each spread."""
    spreads = torch.tensor(SPREADS).repeat_interleave(8)
    return torch.randn(32, 32) * spreads[:, None]


def hold(activation: str, ulps: int, sign: int) -> None:
    """fused_linear by the identity matrix, forward and backward in fp32, so that little but the activation may err."""
    x, w, b = pre_activations().requires_grad_(), torch.eye(32), torch.randn(32)
    with device(90), ContractMode() as mode, errors(ulps, sign):
        y = fused_linear(x, w, b, activation)
        y.backward(torch.randn(y.shape))
    assert {name.split(".")[1] for name in mode.checked} == {"linear_fwd", "linear_bwd"}


@pytest.mark.parametrize("activation", NAMES)
def test_activations_with_exact_arithmetic(activation: str) -> None:
    hold(activation, 0, 1)


@pytest.mark.parametrize(("ulps", "sign"), RUNS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_activations_with_approximate_arithmetic(activation: str, ulps: int, sign: int) -> None:
    hold(activation, ulps, sign)


@pytest.mark.parametrize("sign", [*(pytest.param(sign, marks=pytest.mark.slow) for sign in (-1, 0)), 1])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid"])
def test_gates_with_approximate_arithmetic(activation: str, sign: int) -> None:
    x, gate, up = (t.requires_grad_() for t in (pre_activations(), torch.eye(32), torch.randn(32, 32)))
    with device(90), ContractMode() as mode, errors(2, sign):
        fused_gated_linear(x, gate, up, activation).sum().backward()
    assert len(mode.checked) >= 2


@pytest.mark.parametrize("activation", NAMES)
def test_special_values(activation: str) -> None:
    """Every pre-activation at which a formula breaks, by a bias on products that are 0, with every such gradient."""
    bias = torch.tensor(PRE).repeat(3)[:32].requires_grad_()
    dy = torch.tensor((*DY, 1.0, 1.0)).repeat(4)[:, None].expand(32, 32)
    with device(90), ContractMode() as mode, errors(2, 1):
        fused_linear(torch.zeros(32, 32), torch.eye(32), bias, activation).backward(dy)
    assert len(mode.checked) == 2


@triton.jit
def cancelling(x, SCALE: tl.constexpr, PRECISE: tl.constexpr):
    s = 1.0 / (1.0 + tl.exp2(x * (-SCALE * 1.4426950408889634)))
    return s, s * (1.0 - s)


def test_a_slope_that_cancels_misses_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself: s (1 - s) as it reads loses all digits where s is near 1, and gelu_tanh multiplies it by x^3."""
    monkeypatch.setattr(activations, "_sigmoid_and_slope", cancelling)
    monkeypatch.setattr(gpu, "_compiled", {})
    for function in (activations.activation_grad, linear_bwd.linear_act_bwd_kernel, linear_bwd.linear_dact_kernel):
        monkeypatch.setattr(function, "hash", None)  # or Triton's cache would know it as it was
    hold("gelu_tanh", 0, 1)
    with pytest.raises(AssertionError, match=r"linear_bwd.*beyond the contract"):
        hold("gelu_tanh", 2, 1)


def test_only_approximate_instructions_err() -> None:
    x = np.linspace(0.5, 4.0, 100, dtype=np.float32)
    for op in (("ex2", "approx", "ftz", "f32"), ("sqrt", "approx", "f32"), ("rcp", "approx", "f32")):
        function = arithmetic(op)[0]
        exact = function(x)
        for ulps, sign in ERRORS:
            with errors(ulps, sign):
                moved = function(x).view(np.int32) - exact.view(np.int32)
            assert set(moved) == ({ulps * sign} if sign else {-ulps, ulps})
        assert (function(x) == exact).all()
    with errors(2, 1), np.errstate(all="ignore"):
        for op in (("sqrt", "rn", "f32"), ("mul", "f32"), ("div", "rn", "f32")):
            function, operands = arithmetic(op)[0], (x,) if op[0] == "sqrt" else (x, x)
            assert (function(*operands) == {"sqrt": np.sqrt(x), "mul": x * x, "div": x / x}[op[0]]).all()
        divide = arithmetic(("div", "full", "f32"))[0]
        assert np.isinf(divide(x, np.float32(0))).all()
        assert (divide(np.float32(0) * x, x) == 0).all()
        assert np.isnan(divide(x * np.float32(np.nan), x)).all()
