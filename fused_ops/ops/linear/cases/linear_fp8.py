"""fp8 linear: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Headline, Sample
from ...case_builders import empty, randn, tagged
from .matmul import finite, operand

_FP8 = torch.float8_e4m3fn


def quantise(x: Tensor, row_wise: bool) -> tuple[Tensor, Tensor]:
    """(x / scale in e4m3, scale), the scale one number, or one for each row, that makes the greatest magnitude 448."""
    size = x.float().abs()
    top = size.amax(-1) if row_wise else size.amax()
    scale = top.clamp(min=1e-12) / torch.finfo(_FP8).max
    return (x.float() / (scale.unsqueeze(-1) if row_wise else scale)).to(_FP8), scale


@tagged(
    "gelu",
    addressing=("descriptors", "small_m_long_k", "transposed", "gelu", "silu"),
    first=("gelu", "no_bias", "row_wise(True, False)", "row_wise(False, True)", "odd", "small_m_long_k", "transposed"),
)
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Both kinds of scales, activations, sizes that are no multiples of a tile, layouts. dtype: of the bias and output."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=torch.float32, **kw)

    def case(
        name: str, x: Tensor, N: int, activation: str | None = "gelu", bias: bool = True, rows: tuple[bool, bool] = (True, True)
    ) -> Sample:
        x_fp8, input_scale = quantise(x, rows[0])
        weight, weight_scale = quantise(r(N, x.shape[-1], seed=1, scale=x.shape[-1] ** -0.5), rows[1])
        b = r(N, seed=2).to(dtype) if bias else None
        return Sample(name, (x_fp8, weight, input_scale, weight_scale, b, activation, dtype))

    for activation in (None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2"):
        yield case(f"{activation}", r(9, 33), 21, activation)
    yield case("no_bias", r(9, 33), 21, bias=False)
    for rows in ((False, False), (True, False), (False, True)):
        yield case(f"row_wise{rows}", r(9, 33), 21, rows=rows)
    yield case("descriptors", r(72, 48), 40)  # on Hopper: aligned for TMA, tiles that overhang
    yield case("small_m_long_k", r(3, 1040), 24)  # K in parts
    yield case("odd", r(65, 31), 7)
    yield case("1d", r(33), 5)
    yield case("4d", r(2, 3, 2, 33), 5)
    x, xs = quantise(r(33, 9), False)
    w, ws = quantise(r(33, 21, seed=1), False)
    yield Sample("transposed", (x.t(), w.t(), xs, ws, None, None, dtype))
    yield Sample("scale_shapes", (x.t(), w.t(), xs.expand(9, 1), ws.expand(1, 21), None, None, dtype))


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused."""
    x, w = torch.zeros(3, 4, device=device).to(_FP8), torch.zeros(5, 4, device=device).to(_FP8)
    one = torch.ones((), device=device)

    def refused(name: str, args: tuple[Any, ...], match: str, raises: type[Exception] = RuntimeError) -> ErrorSample:
        return ErrorSample(name, args, {}, raises, match)

    yield refused("dtype", (x.float(), w, one, one), r"input: got torch\.float32, allowed: torch\.float8_e4m3fn")
    yield refused("w_dtype", (x, w.float(), one, one), r"weight: got torch\.float32, allowed: torch\.float8_e4m3fn")
    yield refused("k", (x, w[:, :3], one, one), r"input: got shape \(3, 4\), allowed: last dimension K = 3")
    yield refused("input_scale", (x, w, one.expand(4), one), r"input_scale: got shape \(4,\), allowed: one element")
    yield refused("weight_scale", (x, w, one, one.half()), r"weight_scale: got torch\.float16, allowed: torch\.float32")
    yield refused("bias", (x, w, one, one, one), r"bias: got shape \(\), allowed: shape \(5,\)")
    yield refused("out_dtype", (x, w, one, one, None, None, torch.float64), r"out_dtype: got torch\.float64")
    yield refused("activation", (x, w, one, one, None, "swish"), r"activation: got 'swish', allowed: None, 'relu'")
    yield refused("gradient", (x, w, one.clone().requires_grad_(), one), r"input_scale: got a tensor that requires a gradient")
    yield refused("not_a_tensor", (x, w, 1.0, one), r"input_scale: got float", TypeError)


def fwd_bound(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> tuple[Expected | None, ...]:
    """As fused_linear's, on dequantised operands."""
    from ..activations import ACTIVATIONS

    N, K = weight.shape
    M = math.prod(x.shape[:-1])
    X = x.double().reshape(M, K) * input_scale.double().reshape(-1, 1)
    W = weight.double() * weight_scale.double().reshape(-1, 1)
    b = W.new_zeros(N) if bias is None else bias.double()
    pre = X @ W.t() + b
    terms = max(K, 1) ** 0.5 * (X.abs() @ W.t().abs() + b.abs())
    slope = 2.0 * pre.abs() if activation == "relu2" else 1.2
    y = ACTIVATIONS[activation](pre)
    shape = (*x.shape[:-1], N)
    return (Expected(y.reshape(shape), (finite(slope * terms + pre.abs()) + finite(y.abs())).reshape(shape)),)


_SHAPES = {"square_4096": (4096, 4096, 4096), "wide_8192": (8192, 8192, 4096), "decode_16": (16, 14336, 4096)}  # (M, N, K)


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    M, N, K = shape
    x_fp8, input_scale = quantise(torch.randn(M, K, device=device), True)
    weight, weight_scale = quantise(torch.randn(N, K, device=device) * K**-0.5, True)
    return (x_fp8, weight, input_scale, weight_scale, torch.randn(N, device=device).bfloat16(), variant), {}


def _bytes(case: Case) -> tuple[int, int]:
    M, N, K = case.shape
    return M * K + N * K + 4 * (M + N) + 2 * N + 2 * M * N, 0


def _flops(case: Case) -> tuple[int, int]:
    M, N, K = case.shape
    return 2 * M * N * K, 0


def _scaled_mm(
    x: Tensor, w: Tensor, input_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str | None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """What PyTorch offers: torch._scaled_mm with row-wise scales, then the activation."""
    from ..activations import eager_activation

    product = torch._scaled_mm(
        x, w.t(), input_scale.reshape(-1, 1), weight_scale.reshape(1, -1), bias=bias, out_dtype=out_dtype
    )
    return eager_activation(product, activation or "none")


BENCH = Bench(
    make=_make,
    shapes=_SHAPES,
    dtypes=(_FP8,),
    variants=(None, "gelu"),
    bytes=_bytes,
    flops=_flops,
    baselines={"scaled_mm": _scaled_mm},
    headline=(Headline(10, ("wide_8192_None",), ("fwd",), _FP8),),
)


def audit(device: str) -> Iterator[Sample]:
    """Shapes that take every tile, with a scale a row; then one scale for all, and operands that are not aligned."""

    def call(layout: str, M: int, N: int, K: int, one: bool = False) -> Sample:
        x, w = (operand(rows, K, layout, device, _FP8) for rows in (M, N))
        scales = [empty(1 if one else t.shape[0], device=device, dtype=torch.float32) for t in (x, w)]
        bias = empty(w.shape[0], device=device, dtype=torch.bfloat16)
        return Sample("one scale" if one else layout, (x, w, *scales, bias), {"activation": "gelu"})

    shapes = ((16, 14336, 4096), (32, 14336, 4096), (64, 14336, 4096), (128, 1024, 4096), (512, 2048, 1024), (4096, 4096, 4096))
    for shape in (*shapes, (512, 2056, 1024), (4096, 4104, 4096)):  # the last two: columns that torch._scaled_mm does not take
        yield call("", *shape)
    for M, N, K in (shapes[0], shapes[-1]):
        yield call("", M, N, K, one=True)
        yield call("odd", M, N, K)
