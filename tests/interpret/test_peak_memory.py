"""The most memory that a forward and backward hold at once, ours against eager's and against torch.utils.checkpoint's.

In hidden tensors, M x H elements, of one block M=384, K=48, H=192 in fp16: so x, y and a gradient of them are a quarter, and
a weight an eighth. What existed before (x, the parameters, dy) is not counted. Run it with -s for the figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_ops import fused_gated_linear, fused_linear, fused_mlp
from fused_ops._runtime.device import INTERPRETER_SMS
from fused_ops.kernels.linear.linear_bwd import ACT_BWD_BLOCK_N
from fused_ops.ops.linear import matmul_plan, mlp_launch
from fused_ops.ops.linear.gated_linear_reference import gated_linear_eager
from fused_ops.ops.linear.linear_reference import linear_eager
from fused_ops.ops.linear.mlp_reference import mlp_eager
from tests.memory import peak_of

M, K, H = 384, 48, 192
HIDDEN = M * H * 2
BIAS = H * 2
PARTIAL_SUMS = 8 * INTERPRETER_SMS * ACT_BWD_BLOCK_N * 4  # of a bias's gradient by the elementwise kernel, at any M


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _mlp_leaves(dtype: torch.dtype = torch.float16, rows: int = M) -> list[Tensor]:
    return _leaves((rows, K), (H, K), (H,), (K, H), (K,), dtype=dtype)


def _peak(function: Callable[..., Any], tensors: list[Tensor]) -> int:
    """Bytes at the peak of the forward and backward for the tensors that need a gradient; the output stays alive."""
    dy = torch.randn_like(function(*tensors))

    def step() -> Any:
        out = function(*tensors)
        return torch.autograd.grad(out, [t for t in tensors if t.requires_grad], dy)

    return peak_of(step, [*tensors, dy])


def _said(what: str, **peaks: int) -> None:
    print(f"{what}: " + ", ".join(f"{name} {peak / HIDDEN:.2f}" for name, peak in peaks.items()))


def _slow(*activations: str) -> list[Any]:
    """Those that differ from the others of their test in arithmetic, not in what is held."""
    return [pytest.param(activation, marks=pytest.mark.slow) for activation in activations]


@pytest.mark.parametrize("activation", ["gelu", *_slow("relu", "silu", "quick_gelu")])
def test_mlp(activation: str) -> None:
    """At most eager's, but for one bias gradient that eager computes later; with recompute one hidden tensor less than
    both eager's and checkpoint's, which computes again all that it dropped before the backward begins."""
    tensors = _mlp_leaves()
    eager = _peak(lambda *t: mlp_eager(*t, activation), tensors)
    again = _peak(lambda *t: checkpoint(mlp_eager, *t, activation, use_reentrant=False), tensors)
    ours = _peak(lambda *t: fused_mlp(*t, activation), tensors)
    recompute = _peak(lambda *t: fused_mlp(*t, activation, recompute=True), tensors)
    _said(f"fused_mlp {activation}", eager=eager, checkpoint=again, ours=ours, recompute=recompute)
    assert ours <= eager + BIAS
    assert recompute <= min(eager, again) - HIDDEN + 0.05 * HIDDEN
    assert recompute >= 2 * HIDDEN  # the count itself: the pre-activation and its gradient cannot be missing


@pytest.mark.parametrize("activation", [None, "gelu", *_slow("silu", "relu", "quick_gelu")])
def test_linear(activation: str | None) -> None:
    """At most eager's, but for the bounded partial sums of the bias's gradient, made in the activation's kernel."""
    tensors = _leaves((M, K), (H, K), (H,))
    eager = _peak(lambda *t: linear_eager(*t, activation), tensors)
    ours = _peak(lambda *t: fused_linear(*t, activation), tensors)
    _said(f"fused_linear {activation}", eager=eager, ours=ours)
    assert HIDDEN < ours <= eager + BIAS + (0 if activation is None else PARTIAL_SUMS)


def test_gated_linear() -> None:
    tensors = _leaves((M, K), (H, K), (H, K), (H,), (H,))
    eager = _peak(lambda x, g, u, *b: gated_linear_eager(x, g, u, "silu", *b), tensors)
    ours = _peak(lambda x, g, u, *b: fused_gated_linear(x, g, u, "silu", *b), tensors)
    _said("fused_gated_linear", eager=eager, ours=ours)
    assert 5 * HIDDEN < ours <= eager - 0.4 * HIDDEN


def test_mlp_in_fp32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There cuBLAS makes dy @ w2 and a kernel multiplies it by the derivative in place: the same bound, the same gradients."""
    rows = M // 8
    tensors = _mlp_leaves(torch.float32, rows)
    dy = torch.randn(rows, K)
    usual = torch.autograd.grad(fused_mlp(*tensors), tensors, dy)
    calls: list[bool] = []
    monkeypatch.setattr(mlp_launch, "fp32_on_cublas", lambda t: not calls.append(True))
    for ours, theirs in zip(torch.autograd.grad(fused_mlp(*tensors), tensors, dy), usual):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    assert _peak(fused_mlp, tensors) <= _peak(mlp_eager, tensors) + 2 * BIAS + PARTIAL_SUMS
    assert calls


def test_fp32_is_cublas_s_on_a_gpu_only() -> None:
    assert not matmul_plan.fp32_on_cublas(torch.randn(2, 2))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_kept_graph_gives_equal_bits_twice_and_loses_nothing(recompute: bool) -> None:
    """What the graph keeps is released early only where it is not kept, and never written to."""
    for function, shapes in (
        (lambda *t: fused_mlp(*t, recompute=recompute), ((40, 24), (72, 24), (72,), (24, 72), (24,))),
        (lambda *t: fused_linear(*t, "gelu"), ((40, 24), (72, 24), (72,))),
    ):
        tensors = _leaves(*shapes)
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = function(*tensors)
        before = [t.detach().clone() for t in saved]
        dy = torch.randn_like(y)
        first, second, last = (torch.autograd.grad(y, tensors, dy, retain_graph=keep) for keep in (True, True, False))
        for a, b, c in zip(first, second, last):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        assert all(torch.equal(a, b) for a, b in zip(before, saved))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, tensors, dy)


def test_the_count_sees_what_is_held_and_what_is_freed() -> None:
    """Two tensors at once, though four are made; views share one storage; what was there before does not count."""
    x = torch.randn(1000)

    def step() -> Any:
        for _ in range(2):
            y = x + 1
            z = y.view(10, 100) * 2
            del y, z
        return x.view(2, 500)

    assert peak_of(step, [x]) == 8000
    held: list[Tensor] = []
    assert peak_of(lambda: held.extend(x + i for i in range(3)), [x]) == 12000


@pytest.mark.slow
def test_each_order_of_needs_frees_as_much() -> None:
    """No subset of gradients holds more than all of them."""
    whole = _peak(fused_mlp, _mlp_leaves())
    for needs in itertools.product((False, True), repeat=2):
        tensors = [t.requires_grad_(need) for t, need in zip(_mlp_leaves(), (True, *needs, *needs))]
        assert _peak(fused_mlp, tensors) <= whole
