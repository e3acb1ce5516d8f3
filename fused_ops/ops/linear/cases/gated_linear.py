"""Gated linear: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Headline, Sample
from ...case_builders import INFERENCE, cross, empty, randn, tagged
from .matmul import finite, operand, rounding


@tagged(
    "silu",
    addressing=("descriptors", "sliced", "transposed", "gelu", "silu"),
    rough=("relu", "relu2"),
    first=("silu", "gelu_tanh", "mnk(65, 70, 33)", "mnk(5, 4, 0)", "up_bias", "one_weight_t"),
)
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every activation, biases present and absent, sizes that are no multiples of a tile, any rank, every layout."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=dtype, **kw)

    def case(name: str, x: Tensor, N: int, activation: str | None = "silu", bg: bool = False, bu: bool = False) -> Sample:
        scale = max(x.shape[-1], 1) ** -0.5
        weights = r(N, x.shape[-1], seed=1, scale=scale), r(N, x.shape[-1], seed=2, scale=scale)
        return Sample(name, (x, *weights, activation, r(N, seed=3) if bg else None, r(N, seed=4) if bu else None))

    for activation in (None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2"):
        yield case(f"{activation}", r(9, 17, scale=2.0), 11, activation, True, True)
    yield case("gate_bias", r(9, 17), 11, bg=True)
    yield case("up_bias", r(9, 17), 11, bu=True)
    for M, N, K in ((1, 1, 1), (65, 70, 33), (0, 5, 4), (5, 0, 4), (5, 4, 0)):
        yield case(f"mnk({M}, {N}, {K})", r(M, K), N, bg=True, bu=True)
    yield case("descriptors", r(72, 40), 24)  # on Hopper: aligned for TMA, tiles that overhang
    yield case("1d", r(17), 5)
    yield case("4d", r(2, 3, 2, 17), 5)
    yield case("transposed", r(17, 9).t(), 11)
    yield case("sliced", r(18, 40)[::2, 1:34], 11)
    x = r(72, 40)
    yield Sample("weights_t", (x, r(40, 24, seed=1).t(), r(40, 24, seed=2).t()))
    yield Sample("one_weight_t", (x, r(40, 24, seed=1).t(), r(24, 40, seed=2)))
    yield Sample("weights_of_one_buffer", (x, *r(48, 40, seed=1, scale=0.2).split(24)))


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused."""
    x, w = torch.zeros(3, 4, device=device), torch.zeros(5, 4, device=device)

    def refused(name: str, args: tuple[Any, ...], match: str, raises: type[Exception] = RuntimeError) -> ErrorSample:
        return ErrorSample(name, args, {}, raises, match)

    yield refused("activation", (x, w, w, "swish"), r"activation: got 'swish', allowed: None, 'relu'")
    yield refused("k", (x, w[:, :3], w[:, :3]), r"input: got shape \(3, 4\), allowed: last dimension K = 3")
    yield refused("up_weight", (x, w, w[:4]), r"up_weight: got shape \(4, 4\), allowed: shape \(5, 4\)")
    yield refused("gate_bias", (x, w, w, "silu", x[0]), r"gate_bias: got shape \(4,\), allowed: shape \(5,\)")
    yield refused("dtype", (x, w, w.half()), r"up_weight: got torch\.float16, allowed: the dtype of input")
    yield refused("device", (x, w, torch.zeros(5, 4, device="meta")), r"up_weight: got a tensor on meta")
    yield refused("not_a_tensor", (x, w, None), r"up_weight: got NoneType", TypeError)


def _product(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """x @ w^T + b in fp64, and sqrt(K) times the sum of its terms' magnitudes."""
    X, W = x.double(), w.double()
    B = W.new_zeros(W.shape[0]) if b is None else b.double()
    return X @ W.t() + B, finite(max(x.shape[-1], 1) ** 0.5 * (X.abs() @ W.t().abs() + B.abs()))


def fwd_bound(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[Expected | None, ...]:
    """Each pre-activation errs by sqrt(K) sum|x w|; the gate passes it on by its slope and by the other factor."""
    from ..activations import ACTIVATIONS

    (g, g_terms), (u, u_terms) = _product(x, gate_weight, gate_bias), _product(x, up_weight, up_bias)
    gate = ACTIVATIONS[activation](g)
    slope = 2.0 * g.abs() if activation == "relu2" else 1.2
    spread = finite((slope * g_terms + g.abs()) * u.abs()) + finite(gate.abs() * (u.abs() + u_terms))
    return Expected(gate * u, spread), Expected(g, g_terms) if save_pre else None, Expected(u, u_terms) if save_pre else None


def bwd_bound(
    dy: Tensor, x: Tensor, gate_weight: Tensor, up_weight: Tensor, g: Tensor, u: Tensor, activation: str,
    need_dx: bool, need_dwg: bool, need_dwu: bool, need_dbg: bool, need_dbu: bool,
) -> tuple[Expected | None, ...]:  # fmt: skip
    """dg and du are rounded before the products: half an ulp of each of their terms is allowed."""
    from ..activations import ACTIVATIONS, activation_backward

    N, K = gate_weight.shape
    M = math.prod(dy.shape[:-1])
    D, G, U = (t.double().reshape(M, N) for t in (dy, g, u))
    X = x.double().reshape(M, K) if need_dwg or need_dwu else D.new_zeros((M, K))
    gate = ACTIVATIONS[activation](G)
    dg, du = activation_backward(D * U, G, activation), D * gate
    g_size = finite(dg.abs() + 4.0 * (D * U).abs() * (1.0 + finite(G.abs())))
    u_size = finite(du.abs() + 4.0 * D.abs() * (finite(G.abs()) + gate.abs()))
    g_moved, u_moved = finite(rounding(dg, dy.dtype)), finite(rounding(du, dy.dtype))
    Wg, Wu = gate_weight.double(), up_weight.double()
    shape = (*dy.shape[:-1], K)
    g_terms, u_terms = (2 * N) ** 0.5 * g_size + g_moved, (2 * N) ** 0.5 * u_size + u_moved
    dx_terms = finite(g_terms @ Wg.abs() + u_terms @ Wu.abs())

    def weight(d: Tensor, size: Tensor, moved: Tensor) -> Expected:
        return Expected(d.t() @ X, finite((M**0.5 * size + moved).t() @ X.abs()))

    return (
        Expected((dg @ Wg + du @ Wu).reshape(shape), dx_terms.reshape(shape)) if need_dx else None,
        weight(dg, g_size, g_moved) if need_dwg else None,
        weight(du, u_size, u_moved) if need_dwu else None,
        Expected(dg.sum(0), M**0.5 * g_size.sum(0)) if need_dbg else None,
        Expected(du.sum(0), M**0.5 * u_size.sum(0)) if need_dbu else None,
    )


_SHAPES = {  # (M, N, K)
    "llama3_8b": (8192, 14336, 4096),
    "llama3_70b": (8192, 28672, 8192),
    "gpt2_size": (8192, 3072, 768),
    "decode_1": (1, 14336, 4096),
    "decode_16": (16, 14336, 4096),
    "decode_64": (64, 14336, 4096),
}


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = "silu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    M, N, K = shape
    x = torch.randn(M, K, device=device, dtype=dtype)
    weights = [torch.randn(N, K, device=device, dtype=dtype) * K**-0.5 for _ in range(2)]
    return (x, *weights, variant), {}


def _bytes(case: Case) -> tuple[int, int]:
    M, N, K = case.shape
    return (M * K + 2 * N * K + M * N) * case.dtype.itemsize, (2 * M * K + 4 * N * K + 3 * M * N) * case.dtype.itemsize


def _flops(case: Case) -> tuple[int, int]:
    M, N, K = case.shape
    return 4 * M * N * K, 8 * M * N * K


def _eager(*args: Any) -> Tensor:
    from ..gated_linear_reference import gated_linear_eager

    return gated_linear_eager(*args)


BENCH = Bench(
    make=_make,
    shapes=_SHAPES,
    dtypes=(torch.bfloat16, torch.float16),
    variants=("silu",),
    bytes=_bytes,
    flops=_flops,
    baselines={"eager": _eager},
    headline=(Headline(8, ("llama3_8b_silu",), ("fwd", "bwd")),),
)


def audit(device: str) -> Iterator[Sample]:
    """Shapes that take every tile, forward and backward, with erf's gate and both biases; then what surrounds products."""

    def call(layout: str, M: int, N: int, K: int, activation: str = "gelu", dtype: torch.dtype = torch.bfloat16) -> Sample:
        x, *weights = (operand(rows, K, layout, device, dtype) for rows in (M, N, N))
        biases = [empty(weights[0].shape[0], device=device, dtype=dtype, start=int(layout == "odd")) for _ in range(2)]
        return Sample(layout, (x, *weights, activation, *biases))

    shapes = ((16, 14336, 4096), (64, 14336, 4096), (128, 1024, 4096), (16384, 3072, 768))
    swapped = [(M, K, N) for M, N, K in shapes]  # so that dx has the others' shape
    for layout, shape in cross(("", "odd", "odd sizes"), (*shapes, *swapped)):
        yield call(layout, *shape)
    yield call("transposed", 16384, 3072, 768)
    for shape in (shapes[0], shapes[-1]):
        yield dataclasses.replace(call("", *shape), name=INFERENCE)
    for activation, dtype in cross(("gelu", "silu"), (torch.bfloat16, torch.float32)):
        yield call("", 16384, 3072, 768, activation, dtype)
    x, wg, wu = (empty(*shape, device=device, dtype=torch.bfloat16) for shape in ((16384, 768), (3072, 768), (3072, 768)))
    yield Sample("frozen weights", (x.requires_grad_(), wg, wu, "silu"))
