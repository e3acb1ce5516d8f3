"""RMS norm: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Headline, Sample
from ...case_builders import empty, randn, tagged
from .layer_norm import NOT_NUMBERS, NOT_SHAPES, coarse


@tagged(
    "rows(37, 63)",
    ("long_row", "wide_bwd", "sliced", "offset_view", "transposed", "rows(9, 257)", "heads"),
    rough=("eps_negative", "zeros"),
    first=("rows(2, 1000)", "rows(0, 5)", "no_weight", "transposed", "offset_view", "expanded", "mean_300", "special"),
    slow=("long_row", "wide_bwd"),
)
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Shapes that are no powers of two, any normalized_shape, with and without weight, every layout, hard values."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=dtype, **kw)

    def case(name: str, x: Tensor, n: int, weight: bool = True, eps: float | None = None) -> Sample:
        return Sample(name, (x, (n,), r(n, seed=1) if weight else None, eps))

    for M, N in ((1, 1), (3, 1), (1, 7), (37, 63), (9, 257), (2, 1000), (7, 384), (33, 128), (3, 2049), (0, 5), (5, 0)):
        yield case(f"rows({M}, {N})", r(M, N), N)
    yield case("no_weight", r(6, 65), 65, weight=False)
    yield case("1d", r(19), 19)
    yield case("4d", r(2, 3, 5, 21), 21)
    yield Sample("shape2", (r(4, 5, 6), (5, 6), r(5, 6, seed=1)))
    yield Sample("shape3", (r(3, 5, 6), (3, 5, 6), r(3, 5, 6, seed=1)))
    yield Sample("shape2_empty", (r(65, 1, 0), (1, 0), r(1, 0)))
    yield case("long_row", r(2, 40001, scale=3.0, offset=1.0), 40001)
    yield case("wide_bwd", r(19, 8200), 8200)  # chunked, and more tiles of rows than programs
    yield case("heads", r(3, 5, 4, 64).transpose(1, 2), 64)  # a head is a row: QK norm
    yield case("transposed", r(33, 9).t(), 33)
    yield case("sliced", r(12, 80)[::2, 1:66], 65)
    yield case("offset_view", r(4 * 40 + 1)[1:].view(4, 40), 40)
    yield case("permuted", r(5, 4, 33).transpose(0, 1), 33)
    yield case("expanded", r(1, 21).expand(6, 21), 21)
    yield case("mean_300", r(6, 129, offset=300.0), 129)
    yield case("small", r(6, 129, scale=1e-3), 129)
    yield case("eps_large", r(6, 129), 129, eps=0.5)
    yield case("eps_negative", r(3, 17, scale=1e-2), 17, eps=-1.0)
    special = r(5, 40)
    special[0, 3] = float("nan")
    special[1, 3] = float("inf")
    special[2] = 0.0
    if dtype in (torch.float32, torch.bfloat16):
        special[3] = 1e30  # whose squares overflow fp32: the row becomes 0
    yield case("special", special, 40)
    yield case("zeros", torch.zeros(3, 40, device=device, dtype=dtype), 40, eps=0.0)
    if dtype in (torch.float16, torch.bfloat16):
        yield Sample("fp32_weight", (r(6, 65), (65,), randn(65, device=device, dtype=torch.float32, seed=1)))


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused."""
    x = torch.zeros(3, 4, device=device)
    w = torch.ones(4, device=device)

    def refused(name: str, args: tuple[Any, ...], match: str, raises: type[Exception] = RuntimeError) -> ErrorSample:
        return ErrorSample(name, args, {}, raises, match)

    yield refused("shape", (x, (5,)), r"normalized_shape: got \(5,\) with input of shape \(3, 4\)")
    yield refused("shape_empty", (x, ()), r"normalized_shape: got \(\), allowed: at least one")
    for name, given in NOT_SHAPES.items():
        yield refused(f"shape_{name}", (x, given), r"normalized_shape: got ", TypeError)
    for name, eps in NOT_NUMBERS.items():
        yield refused(f"eps_{name}", (x, (4,), w, eps), r"eps: got ", TypeError)
    yield refused("weight", (x, (4,), w[:3]), r"weight: got shape \(3,\), allowed: shape \(4,\)")
    yield refused("integers", (x.int(), (4,)), r"input: got torch\.int32")
    yield refused("not_a_tensor", ("x", (4,)), r"input: got str", TypeError)
    yield refused("device", (x, (4,), torch.ones(4, device="meta")), r"weight: got a tensor on meta")


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) in fp64 over the last dimension, kept; 0 where the squares overflow what the op computes in."""
    mean = x.double().square().mean(-1, keepdim=True)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return torch.where(x.double().square().amax(-1, keepdim=True) > torch.finfo(wide).max, 0.0, 1.0 / torch.sqrt(mean + eps))


def fwd_bound(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Expected, ...]:
    """The sum of squares has no cancellation: rstd errs by sqrt(N) ulps, and y by as many."""
    N = x.shape[-1]
    rstd = _rstd(x, eps) if N else x.double().new_full((*x.shape[:-1], 1), float("nan"))
    y = x.double() * rstd * (1.0 if weight is None else weight.double())
    return Expected(y, max(N, 1) ** 0.5 * y.abs()), Expected(rstd[..., 0], max(N, 1) ** 0.5 * rstd[..., 0].abs())


def bwd_bound(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Expected | None, ...]:
    """For the given rstd: dx = rstd * (g - h * mean(g * h)) with g = dy * w and h = x * rstd, and dw = sum(dy * h)."""
    N, s, G = x.shape[-1], rstd.double()[..., None], dy.double()
    h = x.double() * s
    g = G if weight is None else G * weight.double()
    dx = s * (g - h * (g * h).mean(-1, keepdim=True))
    size = g.abs() + h.abs() * (g * h).abs().mean(-1, keepdim=True)
    terms = (G * h).reshape(rstd.numel(), N)
    rows = max(terms.shape[0], 1) ** 0.5 * coarse(x, None if weight is None else weight.dtype)
    return (
        Expected(dx, N**0.5 * s.abs() * size) if need_dx else None,
        Expected(terms.sum(0), rows * terms.abs().sum(0)) if need_dw else None,
    )


_SHAPES = (
    (16384, 768), (8192, 1024), (8192, 4096), (8192, 8192), (4096, 16384), (2048, 32768), (2048, 65536), (262144, 128),
    (140, 4096), (1, 4096),
)  # fmt: skip


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    w = torch.randn(shape[1], device=device, dtype=dtype)
    return (torch.randn(shape, device=device, dtype=dtype), (shape[1],), w, 1e-6), {}


def _bytes(case: Case) -> tuple[int, int]:
    M, N = case.shape
    item = case.dtype.itemsize
    return (2 * M * N + N) * item + 4 * M, (3 * M * N + 2 * N) * item + 4 * M


def _flops(case: Case) -> tuple[int, int]:
    elements = case.shape[0] * case.shape[1]
    return 4 * elements, 9 * elements


BENCH = Bench(
    make=_make,
    shapes={f"{M}x{N}": (M, N) for M, N in _SHAPES},
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    bytes=_bytes,
    flops=_flops,
    baselines={"eager": F.rms_norm},
    headline=(
        Headline(20, ("8192x4096", "8192x8192", "262144x128"), ("fwd", "bwd")),
        Headline(21, ("140x4096",), ("fwd:wall",)),
    ),
)


def audit(device: str) -> Iterator[Sample]:
    """Each row length at which a configuration changes, many rows and few, then the weight, addresses and strides."""

    def call(tag: str, x: Tensor, weight: bool = True, dtype: torch.dtype | None = None) -> Sample:
        N = x.shape[-1]
        return Sample(tag, (x, (N,), empty(N, device=device, dtype=dtype or x.dtype) if weight else None))

    def x(M: int, N: int, dtype: torch.dtype = torch.bfloat16, start: int = 0) -> Tensor:
        return empty(M, N, device=device, dtype=dtype, start=start)

    for N in (*_AUDIT_WHOLE, *_AUDIT_ODD):
        yield call("", x(65536, N))
    for N in _AUDIT_FP32:
        yield call("", x(65536, N, torch.float32))
    for N in _AUDIT_ODD:
        yield call("", x(65536, N), weight=False)  # without w, for which the width of loads is judged
    for N in (64, 197, 256, 512):
        yield call("few rows", x(33, N))
    yield call("", x(65536, 4096, torch.float16))
    yield call("", x(65536, 4096), weight=False)
    for N in (4096, 32768):
        yield call("fp32 weight", x(65536, N), dtype=torch.float32)
    yield call("odd address", x(65536, 4096, start=1))
    yield call("heads", x(65536, 4096).view(-1, 32, 128)[:, :8])
    for N in (256, 1000):
        yield call("transposed", x(N, 65536).t())
    yield call("frozen weight", x(65536, 4096).requires_grad_())


_AUDIT_WHOLE = (64, 128, 256, 512, 768, 1024, 4096, 8192, 16384, 32768, 65536)
_AUDIT_FP32 = (256, 1001, 4096, 8192, 16384, 32768, 65536, 50257)
_AUDIT_ODD = (197, 1001, 4097, 8191, 50257)
