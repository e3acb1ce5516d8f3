"""Activations and their gradients at NaN, infinities and large finite values: every way to a gradient agrees with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fused_ops import fused_gated_linear, fused_linear, fused_mlp
from fused_ops.ops.linear.activations import ACTIVATIONS, eager_activation, gelu_is_wrong, repaired
from fused_ops.testing import INTERPRET
from tests.special_values import CLOSES, DY, INF, NAMES, NAN, PRE, exact, pairs

pytestmark = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")
HALF = (torch.bfloat16, torch.float16)


def same(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected.to(out.dtype), equal_nan=True)


def through_bias(op: str, activation: str, bias: Tensor) -> Tensor:
    """act(bias), by an op whose products are 0: each of its columns has a pre-activation of its own. (1, N)."""
    x, w = (bias.new_zeros(shape) for shape in ((1, 1), (bias.shape[0], 1)))
    if op == "linear":
        return fused_linear(x, w, bias, activation)
    if op == "gated_linear":
        return fused_gated_linear(x, w, w, activation, bias, torch.ones_like(bias))
    return fused_mlp(x, w, bias, bias.new_ones((1, bias.shape[0])), None, activation, recompute=op == "mlp_recompute")


def backward(function: Callable[[Tensor], Tensor], pre: Tensor, dy: Tensor, **kwargs: Any) -> Tensor:
    leaf = pre.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, dy, **kwargs)[0].detach()


def dual(function: Callable[[Tensor], Tensor], pre: Tensor, dy: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(pre, dy.reshape(pre.shape)))).tangent


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "backward": backward,
    "create_graph": lambda f, pre, dy: backward(f, pre, dy, create_graph=True),
    "vjp": lambda f, pre, dy: torch.func.vjp(f, pre)[1](dy)[0],
    "jvp": lambda f, pre, dy: torch.func.jvp(f, (pre,), (dy.reshape(pre.shape),))[1],
    "forward AD": dual,
    "vmap": lambda f, pre, dy: torch.func.vmap(lambda p, g: torch.func.vjp(lambda t: f(t[None]), p)[1](g[None, None])[0])(
        pre, dy[0]
    ),
}


@pytest.mark.parametrize("activation", NAMES)
def test_values(activation: str) -> None:
    """With 64 of each value too: ATen computes whole vectors otherwise than what is left of them."""
    for dtype in (torch.float32, torch.float64, *HALF):
        for repeats in (1, 64):
            pre = torch.tensor(PRE, dtype=torch.float64).to(dtype).repeat_interleave(repeats)
            expected = torch.where(
                pre == INF, 1.0 if activation in ("sigmoid", "tanh") else INF, ACTIVATIONS[activation](pre.double())
            )
            for op in ("linear", "gated_linear"):
                same(through_bias(op, activation, pre)[0], expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", NAMES)
def test_gradients_of_a_linear(activation: str, way: str) -> None:
    """Each pair of a pre-activation and a gradient; in 16 bits where the way is ours and not torch's."""
    for dtype in (torch.float32, torch.float64, *(HALF if way in ("backward", "create_graph") else ())):
        pre, dy = pairs(dtype)
        if activation == "quick_gelu" and way in ("jvp", "forward AD"):  # the tangent of 1.702 x overflows
            dy = torch.where(dy == 3e38, 1e38, dy)
        found = WAYS[way](lambda b: through_bias("linear", activation, b), pre, dy[None])
        same(found.reshape(-1), exact(activation, pre, dy))


@pytest.mark.parametrize("way", ["backward", "create_graph", "vjp"])
@pytest.mark.parametrize("op", ["gated_linear", "mlp", "mlp_recompute"])
@pytest.mark.parametrize("activation", NAMES)
def test_gradients_of_the_family(activation: str, op: str, way: str) -> None:
    pre = torch.tensor(PRE)
    for value in DY:
        dy = torch.full((1, 1 if op.startswith("mlp") else len(PRE)), value)
        found = WAYS[way](lambda b: through_bias(op, activation, b), pre, dy)
        same(found, exact(activation, pre, torch.full_like(pre, value)))


@pytest.mark.parametrize("x", [(-1.0, INF), (-INF, 1.0)])
@pytest.mark.parametrize("activation", CLOSES)
def test_inputs_below_a_closed_unit_get_no_gradient(activation: str, x: tuple[float, float]) -> None:
    """dx and dw of the whole op, by autograd of either kind and by torch.func."""
    value, gradient = x
    tensors = [torch.tensor([[value]]), torch.tensor([[1.0]])]

    def of(function: Callable[..., Tensor], way: str) -> list[Tensor]:
        if way == "vjp":
            return list(torch.func.vjp(function, *tensors)[1](torch.tensor([[gradient]])))
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        return list(torch.autograd.grad(y, leaves, torch.full_like(y, gradient), create_graph=way == "create_graph"))

    functions = {
        "linear": (
            lambda x, w: fused_linear(x, w, None, activation),
            lambda x, w: eager_activation(F.linear(x, w), activation),
        ),
        "gated": (
            lambda x, w: fused_gated_linear(x, w, w, activation),
            lambda x, w: eager_activation(F.linear(x, w), activation) * F.linear(x, w),
        ),
    }
    for ours, torchs in functions.values():
        for way in ("backward", "create_graph", "vjp"):
            for found, expected in zip(of(ours, way), of(torchs, "backward")):
                same(found, expected)
            if ours is functions["linear"][0]:
                assert of(ours, way)[0].item() == 0.0


@pytest.mark.parametrize("op", ["linear", "gated_linear"])
@pytest.mark.parametrize("activation", NAMES)
def test_second_derivatives(activation: str, op: str) -> None:
    """Of dy act'(x) with respect to both, in fp32 against torch's in fp64; above a closed unit with every dy."""

    def second(function: Callable[[Tensor], Tensor], dtype: torch.dtype, value: float) -> list[Tensor]:
        pre = torch.tensor(PRE, dtype=dtype).requires_grad_()
        dy = torch.full((1, len(PRE)), value, dtype=dtype).requires_grad_()
        (first,) = torch.autograd.grad(function(pre), pre, dy, create_graph=True)
        grads = torch.autograd.grad(first.sum(), (pre, dy), allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, (pre, dy))]

    for value in DY if activation in CLOSES else (0.0, 1.0, -2.0):
        ours = second(lambda b: through_bias(op, activation, b), torch.float32, value)
        torchs = second(lambda b: eager_activation(b, activation)[None], torch.float64, value)
        for found, expected in zip(ours, torchs):
            same(found, expected)


def test_a_gelu_that_is_wrong_at_infinity_is_repaired() -> None:
    """As ATen's is in the vectors of some CPUs. What is traced stays one gelu."""

    def wrong(x: Tensor) -> Tensor:
        return F.gelu(x) + 0 * x

    assert gelu_is_wrong(wrong)
    right = repaired(wrong)
    assert not gelu_is_wrong(right)
    assert not gelu_is_wrong(ACTIVATIONS["gelu"])
    same(right(torch.tensor([1.0, INF, NAN])), torch.tensor([0.841345, INF, NAN]))
    with torch._subclasses.FakeTensorMode() as mode:
        assert isinstance(right(mode.from_tensor(torch.ones(2))), torch._subclasses.FakeTensor)
