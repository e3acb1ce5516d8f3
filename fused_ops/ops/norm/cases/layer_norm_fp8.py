"""Layer norm to fp8: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Sample
from ...case_builders import cross, empty, randn, tagged
from . import layer_norm

_LARGEST, _LEAST_TOP = 448.0, 1e-12


@tagged(
    "rows(37, 63)",
    addressing=("long_row", "wide_bwd", "sliced", "offset_view", "transposed", "rows(37, 63)", "rows(9, 257)"),
    first=("rows(2, 1000)", "rows(0, 5)", "no_affine", "transposed", "expanded", "special", "spike", "zeros"),
    slow=("long_row", "wide_bwd"),
)
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """fused_layernorm's, rows of zeros, a bias far above the rest of its row, and rows that take three passes."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=dtype, **kw)

    yield from layer_norm.samples(device, dtype)
    yield Sample("long_row_of_vectors", (r(3, 20480, scale=2.0), (20480,), r(20480, seed=1), r(20480, seed=2)))
    yield Sample("zeros", (torch.zeros(3, 40, device=device, dtype=dtype), (40,), r(40, seed=1), None))
    spike = r(40, seed=2)
    spike[7] = 300.0
    yield Sample("spike", (r(5, 40), (40,), None, spike))
    nan = r(40, seed=1)
    nan[3] = float("nan")
    yield Sample("nan_weight", (r(5, 40), (40,), nan, None))


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused: fused_layernorm's, and what needs a gradient."""
    yield from layer_norm.errors(device)
    x, w = torch.zeros(3, 4, device=device), torch.ones(4, device=device, requires_grad=True)
    match = r"weight: got a tensor that requires a gradient, allowed: inference"
    yield ErrorSample("gradient", (x, (4,), w), {}, RuntimeError, match)


def fwd_bound(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Expected, ...]:
    """q is y / scale: it errs by what y does and, relatively, by what the scale does, which is the error of the row's
    greatest |y|; half a spacing of e4m3 for the rounding is the contract's own."""
    normalised = layer_norm.fwd_bound(x, weight, bias, eps)[0]
    y, terms = normalised.value, normalised.scale
    if x.shape[-1] == 0:
        scale = y.new_full(x.shape[:-1], _LEAST_TOP / _LARGEST)
        return Expected(y, terms), Expected(scale, scale)
    scale = y.abs().amax(-1).clamp(min=_LEAST_TOP) / _LARGEST
    unsure = terms.amax(-1) / _LARGEST + 2.0 * scale
    value = y / scale.unsqueeze(-1)
    spread = (terms + value.abs() * unsure.unsqueeze(-1)) / scale.unsqueeze(-1) + 2.0 * value.abs()
    return Expected(value, spread), Expected(scale, unsure)


_SHAPES = ((16384, 1024), (8192, 4096), (4096, 16384), (2048, 32768), (16, 4096))


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    w, b = torch.randn(2, shape[1], device=device, dtype=dtype)
    return (torch.randn(shape, device=device, dtype=dtype), (shape[1],), w, b), {}


def _bytes(case: Case) -> tuple[int, int]:
    M, N = case.shape
    return (M * N + 2 * N) * case.dtype.itemsize + M * N + 4 * M, 0


def _flops(case: Case) -> tuple[int, int]:
    return 11 * case.shape[0] * case.shape[1], 0


def _eager(*args: Any) -> tuple[Tensor, Tensor]:
    from ..layer_norm_fp8_reference import layer_norm_fp8_eager

    return layer_norm_fp8_eager(*args)


BENCH = Bench(
    make=_make,
    shapes={f"{M}x{N}": (M, N) for M, N in _SHAPES},
    dtypes=(torch.bfloat16, torch.float16),
    bytes=_bytes,
    flops=_flops,
    baselines={"eager": _eager},
    headline=(),
)


def audit(device: str) -> Iterator[Sample]:
    """Each row length at which the configuration changes, then other dtypes, strides and parameters."""

    def call(tag: str, x: Tensor, affine: bool = True) -> Sample:
        N = x.shape[-1]
        w, b = (empty(N, device=device, dtype=x.dtype) if affine else None for _ in range(2))
        return Sample(tag, (x, (N,), w, b))

    lengths = (64, 197, 256, 512, 768, 1000, 1024, 1600, 4096, 8192, 16384, 32768, 131072)
    for N, dtype in cross(lengths, (torch.bfloat16, torch.float32)):
        yield call("", empty(65536, N, device=device, dtype=dtype))
    for N in (64, 256):
        yield call("few rows", empty(33, N, device=device, dtype=torch.bfloat16))
    yield call("", empty(65536, 4096, device=device, dtype=torch.float16))
    yield call("odd address", empty(65536, 4096, device=device, dtype=torch.bfloat16, start=1))
    yield call("", empty(65536, 4096, device=device, dtype=torch.bfloat16), affine=False)
