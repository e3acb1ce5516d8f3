"""Gradients of every public function: first and second order, every subset of inputs, and what autograd must refuse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import REGISTRY, fused_layernorm, fused_linear, fused_softmax
from fused_ops._torch.spec import Op
from fused_ops.ops.linear.activations import ACTIVATIONS
from fused_ops.testing import ContractMode
from tests.contract import TRAINED

SPECS = [pytest.param(spec, id=name) for name, spec in TRAINED.items()]


@pytest.mark.parametrize("spec", SPECS)
def test_gradcheck_over_samples(spec: Op) -> None:
    samples = [sample for sample in spec.samples("cpu", torch.float64) if "smooth" in sample.tags]
    assert len(samples) >= 3
    for sample in samples:
        args = tuple(a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in sample.args)
        assert gradcheck(lambda *a, kw=sample.kwargs: spec.public(*a, **kw), args, fast_mode=True), sample.name
        assert gradgradcheck(lambda *a, kw=sample.kwargs: spec.public(*a, **kw), args, fast_mode=True), sample.name


@pytest.mark.parametrize("activation", [None, *(a for a in ACTIVATIONS if a != "none")])
def test_linear_gradients(activation: str | None) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(fused_linear, (x, w, b, activation))
    assert gradgradcheck(fused_linear, (x, w, b, activation))


def _calls() -> list[Any]:
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape)

    return [
        pytest.param(fused_softmax, REGISTRY["softmax"].torch_fn, (r(3, 4),), {"dim": 0}, id="softmax"),
        pytest.param(
            lambda x, w, b: fused_layernorm(x, (4,), w, b),
            lambda x, w, b: torch.nn.functional.layer_norm(x, (4,), w, b),
            (r(3, 4), r(4), r(4)), {}, id="layer_norm",
        ),
        pytest.param(
            lambda x, w, b: fused_linear(x, w, b, "gelu"),
            lambda x, w, b: torch.nn.functional.gelu(torch.nn.functional.linear(x, w, b)),
            (r(3, 4), r(5, 4), r(5)), {}, id="linear",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("function", "eager", "args", "kwargs"), _calls())
def test_every_subset_of_gradients(function: Any, eager: Any, args: Any, kwargs: Any) -> None:
    for wanted in itertools.product((False, True), repeat=len(args)):
        ours = [a.clone().requires_grad_(w) for a, w in zip(args, wanted)]
        theirs = [a.clone().requires_grad_(w) for a, w in zip(args, wanted)]
        out, expected = function(*ours, **kwargs), eager(*theirs, **kwargs)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.square().sum().backward()
            expected.square().sum().backward()
        for mine, other in zip(ours, theirs):
            assert (mine.grad is None) == (other.grad is None)
            if other.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize(("function", "eager", "args", "kwargs"), _calls())
def test_two_backwards_are_bit_equal(function: Any, eager: Any, args: Any, kwargs: Any) -> None:
    leaves = [a.clone().requires_grad_() for a in args]
    out = function(*leaves, **kwargs)
    dy = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves, dy)


@pytest.mark.parametrize(("function", "eager", "args", "kwargs"), _calls())
def test_changing_a_saved_input_in_place_raises(function: Any, eager: Any, args: Any, kwargs: Any) -> None:
    leaves = [a.clone().requires_grad_() for a in args]
    x = leaves[0] * 1.0
    out = function(x, *leaves[1:], **kwargs)
    if function is fused_softmax:
        out.data_ptr()
        x = out  # softmax's backward reads its output
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(("function", "eager", "args", "kwargs"), _calls())
def test_no_graph_without_a_need(function: Any, eager: Any, args: Any, kwargs: Any) -> None:
    leaves = [a.clone().requires_grad_() for a in args]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, ContractMode() as mode:
            out = function(*leaves, **kwargs)
        assert out.grad_fn is None
        assert len(mode.checked) == 1


@pytest.mark.parametrize(("function", "eager", "args", "kwargs"), _calls())
def test_expanded_dy(function: Any, eager: Any, args: Any, kwargs: Any) -> None:
    """sum().backward() hands the backward a dy of strides 0."""
    ours, theirs = [a.clone().requires_grad_() for a in args], [a.clone().requires_grad_() for a in args]
    (function(*ours, **kwargs) * 1.0).sum().backward()
    eager(*theirs, **kwargs).sum().backward()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_hooks_and_accumulation() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()))
    for _ in range(2):
        fused_softmax(x).square().sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(x.grad, seen[0] * 2)


def test_linear_bias_broadcast_gets_its_own_shape_of_gradient() -> None:
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(1, requires_grad=True)
    fused_linear(x, w, b, "silu").sum().backward()
    reference = b.detach().clone().requires_grad_()
    torch.nn.functional.silu(torch.nn.functional.linear(x, w, reference)).sum().backward()
    torch.testing.assert_close(b.grad, reference.grad)
