"""A loss of an op's result and of its gradients at once: what flows back through a saved tensor adds to what flows through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import fused_mlp
from fused_ops.ops.linear.activations import ACTIVATIONS
from fused_ops.ops.linear.mlp_reference import mlp_eager
from tests.torch.calls import Call, each_call


def _gradients(function: Callable[..., Any], leaves: list[Tensor], wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss of the result plus a penalty on the gradients of the wanted leaves."""
    out = function(*leaves)
    first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
    loss = out.sin().sum() + sum(((i + 1) * grad.square().sum() for i, grad in enumerate(first)), torch.zeros(()))
    return torch.autograd.grad(loss, leaves, allow_unused=True)


@each_call
def test_loss_plus_gradient_penalty(call: Call) -> None:
    for chosen in itertools.chain(itertools.combinations(range(len(call.letters)), 1), [range(len(call.letters))]):
        results = []
        for function in (call.ours, call.aten):
            leaves = call.tensors(torch.float64, requires_grad=True)
            results.append(_gradients(function, leaves, [leaves[i] for i in chosen]))
        torch.testing.assert_close(*results, msg=lambda text, chosen=chosen: f"penalty on {tuple(chosen)}: {text}")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_an_mlp(activation: str, recompute: bool) -> None:
    """Its hidden layer is saved before the activation, after it, or both, as the activation has it."""
    results = []
    for function in (fused_mlp, mlp_eager):
        generator = torch.Generator().manual_seed(5)
        shapes = ((3, 4), (6, 4), (6,), (2, 6), (2,))
        leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
        call = lambda *t, function=function: function(*t, activation, recompute=recompute)  # noqa: E731
        results.append(_gradients(call, leaves, leaves))
    torch.testing.assert_close(*results)
