"""A backward in parts, as zero-bubble pipelines run it: the input's gradient first, the weights' later, nothing computed twice."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops.testing import flops
from tests.torch.calls import CALL, CALLS, Call, each_call
from tests.torch.test_autocast_regions import Recorded

RAW = {raw.overload: raw for op in REGISTRY.values() for raw in op.raw}


class Products(TorchDispatchMode):
    """Counts the matrix products that ATen computes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def flops_of(calls: list[tuple[Any, tuple[Any, ...]]]) -> int:
    return sum(flops(RAW[func], [a.shape if isinstance(a, Tensor) else a for a in args]) for func, args in calls)


def parts(count: int) -> list[list[tuple[int, ...]]]:
    """The ways of asking for gradients: each alone, the input's and then the others', and by pairs."""
    every = tuple(range(count))
    return [[(i,) for i in every], [(0,), every[1:]], [every[1:], (0,)], *([pair, tuple(i for i in every if i not in pair)]
            for pair in combinations(every, 2))]  # fmt: skip


@pytest.mark.parametrize("leaf", [True, False])
@each_call
def test_gradients_in_parts_are_the_whole_ones(call: Call, leaf: bool) -> None:
    """Each part gives the bits of the whole backward, of leaves and of results of other operators."""
    given = call.tensors(requires_grad=True)
    tensors = given if leaf else [t * 1 for t in given]
    out = call.ours(*tensors)
    dy = torch.randn_like(out)
    whole = torch.autograd.grad(out, tensors, dy, retain_graph=True)
    for asked in parts(len(tensors)):
        for part in asked:
            if part:
                got = torch.autograd.grad(out, [tensors[i] for i in part], dy, retain_graph=True)
                for gradient, i in zip(got, part, strict=True):
                    assert torch.equal(gradient, whole[i])
    if len(given) > 1:
        torch.autograd.backward(out, dy, inputs=given[1:], retain_graph=True)
        assert given[0].grad is None
        for t, expected in zip(given[1:], whole[1:], strict=True):
            assert t.grad is not None
            assert torch.equal(t.grad, expected)
    torch.autograd.backward(out, dy)
    assert all(t.grad is not None for t in given)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", ["linear", "gated_linear"])
def test_no_product_is_computed_twice(name: str, activation: str | None) -> None:
    """Counted in the FLOPs of the raw operators that run."""
    op = CALL[name].op
    args = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in op.example("cpu", torch.float32).args]
    args[args.index(next(a for a in args if isinstance(a, str)))] = activation
    leaves = [a for a in args if isinstance(a, Tensor)]
    counts = []
    for asked in ([leaves], [leaves[:1], leaves[1:]], [leaves[1:], leaves[:1]]):
        out = op.public(*args)
        with Recorded() as recorded:
            for part in asked:
                torch.autograd.grad(out.sum(), part, retain_graph=True)
        counts.append(flops_of(recorded.calls))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("call", [pytest.param(call, id=call.name) for call in CALLS if "v" in call.letters])
def test_a_norm_computes_what_is_asked_for(call: Call) -> None:
    """Its raw operator is told which gradients: the flags of a backward in parts are those of the whole, shared out."""
    tensors = call.tensors(requires_grad=True)
    out = call.ours(*tensors)
    told = []
    for asked in (tensors[:1], tensors[1:], tensors):
        with Recorded() as recorded:
            torch.autograd.grad(out.sum(), asked, retain_graph=True)
        ((_, args),) = recorded.calls
        told.append([flag for flag in args if isinstance(flag, bool)])
    assert told == [[True, *[False] * (len(tensors) - 1)], [False, *[True] * (len(tensors) - 1)], [True] * len(tensors)]


@pytest.mark.parametrize("name", ["linear", "gated_linear"])
def test_the_differentiable_backward_computes_what_is_asked_for(name: str) -> None:
    """With create_graph too, where ATen computes it: the products of parts are those of the whole, shared out."""
    op = CALL[name].op
    args = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in op.example("cpu", torch.float64).args]
    leaves = [a for a in args if isinstance(a, Tensor)]
    counts = []
    for asked in (leaves[:1], leaves[1:2], leaves):
        out = op.public(*args)
        with Products() as products:
            torch.autograd.grad(out.sum(), asked, create_graph=True)
        counts.append(products.count)
    weights = sum(leaf.dim() == 2 for leaf in leaves[1:])
    assert counts == [weights, 1, 2 * weights]


def test_an_mlp_computes_only_the_hidden_gradient_twice() -> None:
    """The input's gradient and the first layer's both need dy @ weight2, which is not kept between them."""
    op = CALL["mlp"].op
    args = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in op.example("cpu", torch.float32).args]
    x, _, _, weight2, _ = leaves = [a for a in args if isinstance(a, Tensor)]
    counts = []
    for asked in ([leaves], [leaves[:1], leaves[1:]]):
        out = op.public(*args)
        with Recorded() as recorded:
            for part in asked:
                torch.autograd.grad(out.sum(), part, retain_graph=True)
        counts.append(flops_of(recorded.calls))
    assert counts[1] - counts[0] == 2 * x.shape[:-1].numel() * weight2.numel()
