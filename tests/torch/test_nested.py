"""Nested tensors, strided and jagged: what torch.nn.functional computes with, ours computes alike; what it refuses, ours refuses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import fused_gated_linear, fused_layernorm_fp8, fused_linear, fused_mlp
from fused_ops.ops.linear.activations import ACTIVATIONS
from fused_ops.ops.linear.gated_linear_reference import gated_linear_eager
from fused_ops.ops.linear.linear_reference import linear_eager
from fused_ops.ops.linear.mlp_reference import mlp_eager
from tests.torch.calls import CALL, ROWS, Call, OperatorsSeen, each_call

LAYOUTS = (torch.strided, torch.jagged)
LENGTHS = (2, 3, 5)

each_layout: Any = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def nested(rows: Sequence[Tensor], layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():  # strided ones are a prototype, and say so
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(rows), layout=layout)


def tensors_of(call: Call, layout: torch.layout, requires_grad: bool) -> list[Tensor]:
    """The call's tensors, those with rows nested: three parts of unequal lengths."""
    made = []
    for tensor, letter in zip(call.tensors(batch=len(LENGTHS), middle=max(LENGTHS)), call.letters):
        if letter in ROWS:
            tensor = nested([part[:length] for part, length in zip(tensor, LENGTHS)], layout)
        made.append(tensor.requires_grad_(requires_grad))
    return made


def outcome(function: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> tuple[list[Tensor], Exception | None]:
    """The result and the gradients, as far as they come, and what was raised."""
    found: list[Tensor] = []
    try:
        found.append(function(*tensors))
        if backward:
            found.extend(torch.autograd.grad(found[0], tensors, found[0].detach().clone()))
    except Exception as error:
        return found, error
    return found, None


def agree(ours: Callable[..., Tensor], aten: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> int:
    """Hold ours to aten; return how many tensors they gave."""
    found, error = outcome(ours, tensors, backward)
    expected, expected_error = outcome(aten, tensors, backward)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert (type(a), a.layout, a.is_nested) == (type(b), b.layout, b.is_nested)
        for part, other in zip(a.unbind(), b.unbind()):
            assert torch.equal(part, other)
    assert isinstance(error, NotImplementedError) is isinstance(expected_error, NotImplementedError)
    assert isinstance(error, RuntimeError) is isinstance(expected_error, RuntimeError)
    if error is not None and not found:
        assert re.match(
            r"fused_\w+: input: got a nested tensor, allowed: what torch\.nn\.functional takes, which says: ", str(error)
        )
        assert str(error.__cause__) == str(expected_error)
    return len(found)


@each_layout
@each_call
def test_forward_and_backward(call: Call, layout: torch.layout) -> None:
    assert agree(call.ours, call.aten, tensors_of(call, layout, False), False) == 1 or layout is torch.strided
    tensors = tensors_of(call, layout, True)
    assert agree(call.ours, call.aten, tensors, True) == 1 + len(tensors) or layout is torch.strided


def test_what_strided_ones_have_backwards_of() -> None:
    """ATen has them for most, so that the test above compares more than refusals."""
    for name in ("linear", "gated_linear", "mlp", "layer_norm", "softmax"):
        tensors = tensors_of(CALL[name], torch.strided, True)
        assert agree(CALL[name].ours, CALL[name].aten, tensors, True) == 1 + len(tensors)


@pytest.mark.parametrize("activation", [None, *(a for a in ACTIVATIONS if a != "none")])
@each_layout
def test_activations(layout: torch.layout, activation: str | None) -> None:
    x, weight, bias = tensors_of(CALL["linear"], layout, True)
    pairs = (
        (fused_linear, linear_eager, (x, weight, bias)),
        (fused_gated_linear, gated_linear_eager, (x, weight, weight)),
        (fused_mlp, mlp_eager, (x, weight, bias, weight.t(), None)),
    )
    for ours, aten, tensors in pairs:
        agree(
            lambda *t, ours=ours, tensors=tensors: ours(*tensors, activation=activation),
            lambda *t, aten=aten, tensors=tensors: aten(*tensors, activation=activation),
            [x, weight],
            True,
        )


def test_what_is_wrong_besides_is_said_first() -> None:
    for layout in LAYOUTS:
        x = nested([torch.randn(2, 4), torch.randn(3, 4)], layout)
        with pytest.raises(RuntimeError, match=r"^fused_linear: activation: got 'swish', allowed: None, 'relu'"):
            fused_linear(x, torch.randn(6, 4), None, "swish")
        with pytest.raises(RuntimeError, match=r"^fused_layernorm_fp8: weight: got a tensor that requires a gradient"):
            fused_layernorm_fp8(x, [4], torch.ones(4, requires_grad=True))
        with pytest.raises(RuntimeError, match=r"^fused_linear: input: got a nested tensor, allowed: what torch"):
            fused_linear(x, torch.randn(6, 5))
        with pytest.raises(RuntimeError, match=r"^fused_linear: weight: got a nested tensor, allowed: what torch"):
            fused_linear(torch.randn(2, 4), x)


def test_no_operator_of_ours_meets_one() -> None:
    for layout in LAYOUTS:
        x = nested([torch.randn(2, 4), torch.randn(3, 4)], layout)
        with OperatorsSeen() as seen:
            expected = linear_eager(x, torch.eye(4), None, "relu")
            assert all(map(torch.equal, fused_linear(x, torch.eye(4), None, "relu").unbind(), expected.unbind()))
        assert not seen


@each_layout
@each_call
def test_autocast(call: Call, layout: torch.layout) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(call.ours, call.aten, tensors_of(call, layout, True), False)


@each_call
def test_compiled(call: Call) -> None:
    """Dynamo takes jagged ones; the graph then holds ATen's operators."""
    torch._dynamo.reset()
    tensors = tensors_of(call, torch.jagged, True)
    compiled = torch.compile(call.ours, backend="aot_eager", fullgraph=True)
    assert agree(compiled, call.aten, tensors, True) == 1 + len(tensors)
