"""Gradients of every public function: first and second order, every subset of inputs, and what autograd must refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import REGISTRY, fused_linear, fused_softmax
from fused_ops.ops.linear.activations import ACTIVATIONS
from fused_ops.testing import ContractMode, Op, Sample
from tests.contract import TRAINED
from tests.torch.calls import Call, each_call

SPECS = [pytest.param(spec, id=name) for name, spec in TRAINED.items()]
FORWARD_ONLY = [pytest.param(spec, id=name) for name, spec in REGISTRY.items() if not spec.trains]


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


@each_call
def test_every_subset_of_gradients(call: Call) -> None:
    for wanted in itertools.product((False, True), repeat=len(call.letters)):
        ours, theirs = ([t.requires_grad_(w) for t, w in zip(call.tensors(), wanted)] for _ in range(2))
        out, expected = call.ours(*ours), call.aten(*theirs)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.square().sum().backward()
            expected.square().sum().backward()
        for mine, other in zip(ours, theirs):
            assert (mine.grad is None) == (other.grad is None)
            if other.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad)


@each_call
def test_two_backwards_are_bit_equal(call: Call) -> None:
    leaves = call.tensors(requires_grad=True)
    out = call.ours(*leaves)
    dy = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves, dy)


@each_call
def test_changing_a_tensor_in_place_raises_or_makes_no_difference(call: Call) -> None:
    """After the forward, an argument or the result is changed: autograd notices if the backward would have read it."""
    leaves = call.tensors(requires_grad=True)
    expected = torch.autograd.grad(call.ours(*leaves), leaves, torch.ones_like(call.ours(*leaves)))
    refused = 0
    for changed in range(len(leaves) + 1):
        arguments = [t * 1.0 for t in leaves]
        out = call.ours(*arguments)
        dy = torch.ones_like(out)
        with torch.no_grad():
            (*arguments, out)[changed].add_(1.0)
        found, message = None, ""
        try:
            found = torch.autograd.grad(out, leaves, dy)
        except RuntimeError as error:
            message = str(error)
        if found is None:
            assert "modified by an inplace operation" in message
            refused += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert refused


@each_call
def test_no_graph_without_a_need(call: Call) -> None:
    leaves = call.tensors(requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, ContractMode() as mode:
            out = call.ours(*leaves)
        assert out.grad_fn is None
        assert len(mode.checked) == 1


@each_call
def test_expanded_dy(call: Call) -> None:
    """sum().backward() hands the backward a dy of strides 0."""
    ours, theirs = call.tensors(requires_grad=True), call.tensors(requires_grad=True)
    (call.ours(*ours) * 1.0).sum().backward()
    call.aten(*theirs).sum().backward()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


@each_call
def test_gradients_of_gradients_are_the_baselines(call: Call) -> None:
    results = []
    for function in (call.ours, call.aten):
        leaves = call.tensors(torch.float64, requires_grad=True)
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        results.append((first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    torch.testing.assert_close(results[0], results[1])


def _tensors(sample: Sample) -> list[tuple[int, Tensor]]:
    return [(i, a) for i, a in enumerate(sample.args) if isinstance(a, Tensor)]


@pytest.mark.parametrize("spec", FORWARD_ONLY)
def test_an_op_without_a_backward_refuses_gradients(spec: Op) -> None:
    """Whichever argument needs one; where none is recorded, the call is the ordinary one."""
    sample = spec.example("cpu", torch.bfloat16)
    expected = spec.public(*sample.args, **sample.kwargs)
    assert _tensors(sample)
    for position, tensor in _tensors(sample):
        leaf = tensor.detach().clone().requires_grad_()
        args = [leaf if i == position else a for i, a in enumerate(sample.args)]
        with pytest.raises(RuntimeError, match=r": got a tensor that requires a gradient, allowed: inference"):
            spec.public(*args, **sample.kwargs)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context, ContractMode() as mode:
                out = spec.public(*args, **sample.kwargs)
            assert mode.checked == [str(spec.fwd)]
            for got, want in zip(*((t,) if isinstance(t, Tensor) else t for t in (out, expected))):
                assert not got.requires_grad
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


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
