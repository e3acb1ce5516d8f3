"""The linear family in ATen mode: gradients of gradients, what is kept for the backward, refusals, and the choice of kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import REGISTRY, fused_gated_linear, fused_linear, fused_linear_fp8, fused_mlp
from fused_ops.kernels.linear.linear_config import linear_config
from fused_ops.ops.linear.activations import ACTIVATIONS
from fused_ops.ops.linear.gated_linear_reference import gated_linear_eager
from fused_ops.ops.linear.linear_launch import plan_of
from fused_ops.ops.linear.linear_reference import linear_eager
from fused_ops.ops.linear.mlp_reference import mlp_eager
from fused_ops.testing import INTERPRET, ContractMode, Expected, contract_error
from tests import process

pytestmark = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")
NAMES = [None, *(name for name in ACTIVATIONS if name != "none")]


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("activation", NAMES)
def test_gated_linear_gradients(activation: str | None) -> None:
    x, w_gate, w_up, b_gate, b_up = _leaves((2, 3, 4), (5, 4), (5, 4), (5,), (5,))

    def call(*t: Tensor) -> Tensor:
        return fused_gated_linear(t[0], t[1], t[2], activation, t[3], t[4])

    assert gradcheck(call, (x, w_gate, w_up, b_gate, b_up))
    assert gradgradcheck(call, (x, w_gate, w_up, b_gate, b_up))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", NAMES)
def test_mlp_gradients(activation: str | None, recompute: bool) -> None:
    tensors = _leaves((2, 3, 4), (5, 4), (5,), (2, 5), (2,))
    assert gradcheck(lambda *t: fused_mlp(*t, activation, recompute=recompute), tensors)
    assert gradgradcheck(lambda *t: fused_mlp(*t, activation, recompute=recompute), tensors)


FAMILIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda *t: fused_linear(*t, "gelu"), lambda *t: linear_eager(*t, "gelu"), [(4, 3), (5, 3), (5,)]),
    "linear_relu": (lambda *t: fused_linear(*t, "relu"), lambda *t: linear_eager(*t, "relu"), [(4, 3), (5, 3), (5,)]),
    "linear_bare": (fused_linear, linear_eager, [(4, 3), (5, 3), (5,)]),
    "gated_linear": (
        lambda x, g, u, bg, bu: fused_gated_linear(x, g, u, "silu", bg, bu),
        lambda x, g, u, bg, bu: gated_linear_eager(x, g, u, "silu", bg, bu),
        [(4, 3), (5, 3), (5, 3), (5,), (5,)],
    ),
    "mlp": (fused_mlp, mlp_eager, [(4, 3), (5, 3), (5,), (2, 5), (2,)]),
    "mlp_recompute": (lambda *t: fused_mlp(*t, recompute=True), mlp_eager, [(4, 3), (5, 3), (5,), (2, 5), (2,)]),
    "mlp_relu": (lambda *t: fused_mlp(*t, "relu"), lambda *t: mlp_eager(*t, "relu"), [(4, 3), (5, 3), (5,), (2, 5), (2,)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_subset_of_gradients_once_and_twice(family: str) -> None:
    """First and second derivatives equal eager's for each subset of inputs that need one: frozen weights, LoRA, biases."""
    fused, eager, shapes = FAMILIES[family]
    for needs in itertools.product((False, True), repeat=len(shapes)):
        if not any(needs):
            continue
        results = []
        for function in (fused, eager):
            torch.manual_seed(1)
            tensors = [torch.randn(s, dtype=torch.float64).requires_grad_(n) for s, n in zip(shapes, needs)]
            wanted = [t for t in tensors if t.requires_grad]
            y = function(*tensors)
            dy = torch.randn_like(y).requires_grad_()
            first = torch.autograd.grad(y, wanted, dy, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [*wanted, dy], allow_unused=True)
            results.append([*first, *(torch.zeros(()) if g is None else g for g in second)])
            once = torch.autograd.grad(function(*tensors), wanted, dy.detach())
            for a, b in zip(once, first):
                torch.testing.assert_close(a, b)
        for ours, theirs in zip(*results):
            torch.testing.assert_close(
                ours.expand_as(theirs) if ours.dim() == 0 else ours, theirs.expand_as(ours), msg=str(needs)
            )


def _kept(function: Callable[..., Tensor], tensors: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of function(*tensors), parameters and constants apart."""
    storages: dict[int, int] = {}
    weights = {t.untyped_storage().data_ptr() for t in tensors[1:]}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*tensors)
    assert out.requires_grad
    return sum(storages.values())


M, K, H, N = 64, 16, 48, 32
ACT_BYTES, X_BYTES = M * H * 4, M * K * 4


def _inputs(*shapes: tuple[int, ...], frozen: bool = False) -> list[Tensor]:
    return [torch.randn(s, requires_grad=i == 0 or not frozen) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_keeps_no_more_than_eager(activation: str | None, frozen: bool) -> None:
    """Frozen weights (LoRA, prompt tuning) keep the pre-activation only, and nothing where there is no activation."""
    tensors = _inputs((M, K), (H, K), (H,), frozen=frozen)
    ours = _kept(lambda *t: fused_linear(*t, activation), tensors)
    assert ours <= _kept(lambda *t: linear_eager(*t, activation), tensors)
    assert ours == (0 if activation is None else ACT_BYTES) + (0 if frozen else X_BYTES)


@pytest.mark.parametrize("frozen", [False, True])
def test_gated_linear_keeps_less_than_eager(frozen: bool) -> None:
    tensors = _inputs((M, K), (H, K), (H, K), frozen=frozen)
    assert _kept(fused_gated_linear, tensors) == 2 * ACT_BYTES + (0 if frozen else X_BYTES)
    assert _kept(gated_linear_eager, tensors) == 3 * ACT_BYTES + (0 if frozen else X_BYTES)


def test_mlp_keeps_what_it_says() -> None:
    """gelu: eager keeps x, the pre-activation and the activation; recompute drops the last; relu needs the last alone."""
    tensors = _inputs((M, K), (H, K), (H,), (N, H), (N,))
    assert _kept(mlp_eager, tensors) == X_BYTES + 2 * ACT_BYTES
    assert _kept(fused_mlp, tensors) == X_BYTES + 2 * ACT_BYTES
    assert _kept(lambda *t: fused_mlp(*t, recompute=True), tensors) == X_BYTES + ACT_BYTES
    assert _kept(lambda *t: fused_mlp(*t, "relu"), tensors) == X_BYTES + ACT_BYTES
    frozen = _inputs((M, K), (H, K), (H,), (N, H), (N,), frozen=True)
    assert _kept(fused_mlp, frozen) == _kept(mlp_eager, frozen) == ACT_BYTES


def test_hidden_layer_is_freed_when_recomputed() -> None:
    """The raw forward hands out no activation that recompute would have dropped."""
    x, w1, w2 = torch.randn(M, K), torch.randn(H, K), torch.randn(N, H)
    y, pre, h = torch.ops.fused_ops.mlp_fwd(x, w1, None, w2, None, "gelu", True, False)
    assert (y.shape, pre.shape, h.numel()) == ((M, N), (M, H), 0)


def test_changing_a_saved_input_raises() -> None:
    x, w1, w2 = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    for function in (lambda a: fused_gated_linear(a, w1, w2), lambda a: fused_mlp(a, w1, None, w2, None)):
        held = x.clone()
        y = function(held)
        held.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_two_backwards_agree_bit_for_bit() -> None:
    tensors = [torch.randn(s, requires_grad=True) for s in ((5, 4), (6, 4), (6,), (3, 6), (3,))]
    y = fused_mlp(*tensors)
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(y.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_autocast_casts_as_linear_does() -> None:
    x, w, v = (torch.randn(4, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_gated_linear(x, w, v).dtype is torch.bfloat16
        assert fused_mlp(x, w, None, v, None).dtype is torch.bfloat16


@pytest.mark.parametrize("function", [fused_gated_linear, lambda x, w, v: fused_mlp(x, w, None, v, None)])
def test_under_transforms(function: Callable[..., Tensor]) -> None:
    x, w, v = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    grad = torch.func.grad(lambda t: function(t, w, v).sum())(x)
    leaf = x.clone().requires_grad_()
    function(leaf, w, v).sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    rows = torch.func.vmap(lambda row: function(row, w, v))(x)
    torch.testing.assert_close(rows, function(x, w, v))
    _, tangent = torch.func.jvp(lambda t: function(t, w, v), (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()


def test_fp8_reference_and_refusals() -> None:
    spec = REGISTRY["linear_fp8"]
    for dtype in (torch.float32, torch.bfloat16):
        for sample in spec.samples("cpu", dtype):
            with ContractMode() as mode:
                out = fused_linear_fp8(*sample.args)
            assert mode.checked
            assert out.dtype is dtype
    errors = list(spec.errors("cpu"))
    assert len(errors) >= 8
    for error in errors:
        with ContractMode() as mode, pytest.raises(error.raises, match=error.match):
            spec.public(*error.args, **error.kwargs)
        assert not mode.checked


def test_contract_catches_a_bias_added_before_the_scales() -> None:
    """A likely mistake in an fp8 epilogue is far outside the bound."""
    x, w = torch.randn(9, 33).to(torch.float8_e4m3fn), torch.randn(7, 33).to(torch.float8_e4m3fn)
    xs, ws, b = torch.full((), 0.5), torch.full((), 0.25), torch.randn(7)
    expected: Expected = REGISTRY["linear_fp8"].bound(x, w, xs, ws, b, "none", torch.float32)[0]
    product = F.linear(x.float(), w.float())
    assert contract_error(product * 0.125 + b, expected).max() <= 1
    assert contract_error((product + b) * 0.125, expected).max() > 100


def _choice(
    M: int, N: int, K: int, capability: tuple[int, int], access: str = "tma", use: str = "fwd", itemsize: int = 2
) -> Any:
    return linear_config(M, N, K, itemsize, capability, 132, access, use)


def test_choice_by_capability_size_and_alignment() -> None:
    big = (16384, 4096, 2048)
    assert _choice(*big, (9, 0)).kind == _choice(*big, (10, 0)).kind == "tma"
    assert (_choice(*big, (9, 0)).block_m, _choice(*big, (9, 0)).block_n) == (128, 256)
    assert _choice(*big, (8, 0)).kind == _choice(*big, (12, 0)).kind == _choice(*big, (8, 9)).kind == "pointer"
    assert _choice(*big, (9, 0), "aligned").kind == _choice(*big, (9, 0), "any").kind == "pointer"
    assert _choice(16, 14336, 4096, (9, 0)).kind == _choice(16, 14336, 4096, (8, 0)).kind == "split_k"
    assert _choice(16, 14336, 4096, (9, 0), use="gated").kind == "pointer"
    assert _choice(128, 1024, 4096, (9, 0)).block_n < 256  # few tiles: smaller ones, so that more SMs work


@pytest.mark.parametrize("N", [64, 1024, 14336, 50257])
def test_split_k_covers_k_and_stays_bounded(N: int) -> None:
    for K, M in itertools.product((512, 1031, 4096, 28672), (1, 17, 64)):
        config = _choice(M, N, K, (9, 0))
        per_split = -(-K // (config.splits * config.block_k)) * config.block_k
        assert 1 <= config.splits <= 32
        assert (-(-K // per_split) - 1) * per_split < K <= -(-K // per_split) * per_split
        assert config.block_m >= M


@pytest.mark.parametrize("use", ["fwd", "dact"])
def test_short_products_run_two_programs_an_sm(use: str) -> None:
    """So that the epilogue of one runs under the products of the other; each has half of an SM's shared memory and registers."""
    for M, K in itertools.product((65, 200, 1000, 16384), (64, 768, 1024)):
        config = _choice(M, 4096, K, (9, 0), use=use)
        tiles = config.num_stages * (config.block_m + config.block_n) * config.block_k * 2
        out = config.block_m * config.block_n // config.subtiles * 2
        assert config.programs * (tiles + out + 1024) <= 228 * 1024
        assert config.programs * config.num_warps <= 16
    assert _choice(16384, 3072, 768, (9, 0), use=use).programs == 2
    assert _choice(16384, 3072, 4096, (9, 0), use=use).programs == 1


def test_shared_memory_of_every_tile_fits() -> None:
    """Stages of both operands against what a block may have; the audit checks the compiled kernels."""
    for capability, limit in (((8, 0), 163), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)):
        for use, (M, N), access in itertools.product(
            ("fwd", "dact", "gated", "sum", "fp8"),
            ((16, 4096), (64, 4096), (200, 600), (16384, 4096)),
            ("tma", "aligned", "any"),
        ):
            itemsize = 1 if use == "fp8" else 2
            c = linear_config(M, N, 4096, itemsize, capability, 132, access, use)
            columns = 2 * c.block_n if use == "gated" else c.block_n
            stages = c.num_stages - (capability[0] in (8, 12))  # mma.sync reads the last stage into registers
            assert stages * (c.block_m + columns) * c.block_k * itemsize <= limit * 1024, (capability, use, c)


def test_plan_says_why() -> None:
    plan, *_ = plan_of(torch.randn(100, 64).half(), torch.randn(64, 64).half(), None, "gelu", False)
    assert plan.backend == "triton"
    assert plan.config is not None
    assert "epilogue" in plan.reason


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.allow_tf32 = False"], "tf32 ieee"),
        (
            [
                "torch.set_float32_matmul_precision('high')",
                "torch.set_float32_matmul_precision('highest')",
                "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
                "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
            ],
            "tf32 ieee tf32 ieee",
        ),
    ],
    ids=["legacy", "new"],
)
def test_tf32_follows_torch(settings: list[str], expected: str) -> None:
    """In processes of their own: mixing the old setting and the new is an error in torch, and they are global."""
    ask = "print(precision_of(torch.float32, True)); assert precision_of(torch.float16, True) == 'ieee'"
    code = "; ".join(
        ["import torch", "from fused_ops.ops.linear.matmul_plan import precision_of", *(f"{s}; {ask}" for s in settings)]
    )
    assert " ".join(process.output(code).split()) == expected


@pytest.mark.parametrize("family", ["linear", "linear_relu", "gated_linear", "mlp", "mlp_recompute", "mlp_relu"])
def test_compiled_gradients_and_compiled_autograd(family: str) -> None:
    """Backwards of two steps, which in eager mode let go of what was saved, are traced whole."""
    from torch._dynamo import compiled_autograd

    fused, _, shapes = FAMILIES[family]
    tensors = [torch.randn(s, requires_grad=True) for s in shapes]
    expected = torch.autograd.grad(fused(*tensors).square().sum(), tensors)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(*tensors).square().sum(), tensors), expected):
        torch.testing.assert_close(ours, theirs)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        fused(*tensors).square().sum().backward()
    for tensor, theirs in zip(tensors, expected):
        torch.testing.assert_close(tensor.grad, theirs)
    torch._dynamo.reset()
