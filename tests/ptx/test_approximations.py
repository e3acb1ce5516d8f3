"""The contract holds for every op while approximate instructions err as PTX documents, and not only where they are exact."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops import REGISTRY, fused_gated_linear, fused_linear
from fused_ops.kernels.linear import activations, linear_bwd
from fused_ops.ops.linear.activations import ACTIVATIONS, SAVES_OUTPUT
from fused_ops.testing import ContractMode

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops.testing.ptx import gpu
from fused_ops.testing.ptx.approximate import errors
from fused_ops.testing.ptx.arithmetic import arithmetic
from fused_ops.testing.ptx.gpu import device
from tests.ptx import error_table
from tests.ptx.error_table import DTYPES, LENGTHS, SIGNS, SPREADS, calls, ratios
from tests.special_values import DY, PRE

NAMES = [name for name in ACTIVATIONS if name != "none"]
SMOOTH = [name for name in NAMES if name not in (*SAVES_OUTPUT, "relu2")]  # those that compute an exponential
ERRORS = [(ulps, sign) for ulps in (1, 2) for sign in (-1, 0, 1)]
RUNS = [
    pytest.param(ulps, sign, id=f"{ulps}ulp{sign:+d}", marks=() if (ulps, sign) == (2, 1) else (pytest.mark.slow,))
    for ulps, sign in ERRORS
]
HELD = {(name, dtype): calls(op, DTYPES[dtype]) for name, op in REGISTRY.items() for dtype in DTYPES}


def held(which: str) -> list[Any]:
    """pytest parameters (op name, dtype, index of a call): of every op the first call in fp32, or all of them."""
    return [
        pytest.param(name, dtype, i, id=f"{name}-{dtype}-{call.name}")
        for (name, dtype), found in HELD.items()
        for i, call in enumerate(found)
        if which == "all" or (dtype == "fp32" and i == 0)
    ]


def holds(name: str, dtype: str, index: int, sign: int) -> None:
    op = REGISTRY[name]
    found = ratios(HELD[name, dtype][index], None, sign)
    assert {raw.name for raw in op.raw} <= set(found)
    assert max(found.values()) <= 1, (sign, found)


@pytest.mark.parametrize(("name", "dtype", "index"), held("first"))
def test_every_op_within_documented_errors(name: str, dtype: str, index: int) -> None:
    """Each raw operator once, forward and backward, by hash. `make slow` runs every activation, length and dtype."""
    holds(name, dtype, index, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "index"), held("all"))
def test_every_call_within_documented_errors(name: str, dtype: str, index: int) -> None:
    for sign in SIGNS:
        holds(name, dtype, index, sign)


def test_calls_have_every_activation_and_length() -> None:
    """What is held is what the registry has: an op's samples, whatever ops there are."""
    assert {name for name, _ in HELD} == set(REGISTRY)
    for (name, _), found in HELD.items():
        names = {call.name for call in found}
        if REGISTRY[name].roles.multiplies:
            assert names == set(NAMES)
        else:
            assert names == {"basic", *(f"N = {length}" for length in LENGTHS)}


@pytest.mark.slow
def test_the_table_of_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure for each raw operator and column; where exponentials are most of the error, more of it is a greater ratio."""
    monkeypatch.setattr(sys, "argv", ["error_table", "--json", "--op", "softmax", "--dtype", "fp32"])
    assert error_table.main() == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["operator"], row["call"]) for row in found} == {
        (raw.name, call.name) for raw in REGISTRY["softmax"].raw for call in HELD["softmax", "fp32"]
    }
    for row in found:
        assert all(0 < row[column] <= 1 for column in error_table.COLUMNS)
    assert any(row["exact"] < row["1 ulp"] < row["2 ulp"] for row in found)


def pre_activations() -> Tensor:
    """(32, 32) fp32, a quarter of the rows of each spread."""
    spreads = torch.tensor(SPREADS).repeat_interleave(8)
    return torch.randn(32, 32) * spreads[:, None]


def hold(activation: str, ulps: int | None, sign: int, dtype: torch.dtype = torch.float32) -> None:
    """fused_linear by the identity matrix, forward and backward, so that little but the activation may err."""
    x, w, b = (t.to(dtype) for t in (pre_activations(), torch.eye(32), torch.randn(32)))
    x.requires_grad_()
    with device(90), ContractMode() as mode, errors(ulps, sign):
        y = fused_linear(x, w, b, activation)
        y.backward(torch.randn(y.shape).to(dtype))
    assert {name.split(".")[1] for name in mode.checked} == {"linear_fwd", "linear_bwd"}


@pytest.mark.parametrize("activation", NAMES)
def test_activations_with_exact_arithmetic(activation: str) -> None:
    hold(activation, 0, 1)


@pytest.mark.parametrize(("ulps", "sign"), RUNS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_activations_with_approximate_arithmetic(activation: str, ulps: int, sign: int) -> None:
    hold(activation, ulps, sign)


@pytest.mark.parametrize(
    "activation", [pytest.param(name, marks=() if name == "gelu_tanh" else pytest.mark.slow) for name in SMOOTH]
)
def test_16_bit_activations_with_approximate_arithmetic(activation: str) -> None:
    """They have a slope of their own, which takes fewer registers."""
    for sign in SIGNS:
        hold(activation, None, sign, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid"])
def test_gates_with_approximate_arithmetic(activation: str, sign: int) -> None:
    x, gate, up = (t.requires_grad_() for t in (pre_activations(), torch.eye(32), torch.randn(32, 32)))
    with device(90), ContractMode() as mode, errors(2, sign):
        fused_gated_linear(x, gate, up, activation).sum().backward()
    assert len(mode.checked) >= 2


SPECIAL = [
    pytest.param(
        name, dtype, id=f"{name}-{str(dtype)[6:]}", marks=() if dtype is torch.float32 or name == "silu" else pytest.mark.slow
    )
    for dtype in (torch.float32, torch.bfloat16)
    for name in NAMES
]


@pytest.mark.parametrize(("activation", "dtype"), SPECIAL)
def test_special_values(activation: str, dtype: torch.dtype) -> None:
    """Every pre-activation at which a formula breaks, by a bias on products that are 0, with every such gradient."""
    bias = torch.tensor(PRE).repeat(3)[:32].to(dtype).requires_grad_()
    dy = torch.tensor((*DY, 1.0, 1.0)).repeat(4)[:, None].expand(32, 32).to(dtype)
    with device(90), ContractMode() as mode, errors(2, 1):
        fused_linear(torch.zeros(32, 32, dtype=dtype), torch.eye(32, dtype=dtype), bias, activation).backward(dy)
    assert len(mode.checked) == 2


@triton.jit
def cancelling(x, SCALE: tl.constexpr, PRECISE: tl.constexpr):
    s = 1.0 / (1.0 + tl.exp2(x * (-SCALE * 1.4426950408889634)))
    return s, s * (1.0 - s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_slope_that_cancels_misses_the_contract(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself: s (1 - s) as it reads loses all digits where s is near 1, and gelu_tanh multiplies it by x^3."""
    monkeypatch.setattr(activations, "_sigmoid_and_slope", cancelling)
    monkeypatch.setattr(gpu, "_compiled", {})
    for function in (activations.activation_grad, linear_bwd.linear_act_bwd_kernel, linear_bwd.linear_dact_kernel):
        monkeypatch.setattr(function, "hash", None)  # or Triton's cache would know it as it was
    hold("gelu_tanh", 0, 1, dtype)
    with pytest.raises(AssertionError, match=r"linear_bwd.*beyond the contract"):
        hold("gelu_tanh", None, 1, dtype)


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
