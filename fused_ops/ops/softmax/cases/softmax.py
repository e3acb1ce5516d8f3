"""Softmax: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Headline, Sample
from ...case_builders import cross, empty, randn, tagged

INF, NAN = float("inf"), float("nan")


@tagged(
    "rows(7, 255)",
    addressing=("long_row", "long_masked", "inner_long", "wide_range", "sliced", "offset", "transposed"),
    first=(
        "rows(9, 257)", "rows(3, 513)", "rows(0, 5)", "3d_dim1", "transposed", "sliced", "offset", "special", "long_masked",
        "to_float32",
    ),
)  # fmt: skip
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Shapes that are no powers of two, every dim, every layout, and the values that break softmaxes."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=dtype, **kw)

    for shape in ((1, 1), (3, 1), (5, 7), (7, 255), (9, 257), (2, 1000), (33, 64), (3, 513), (0, 5), (4, 0)):
        yield Sample(f"rows{shape}", (r(*shape),), {"dim": -1})
    for dim in (0, 1, 2, -1):
        yield Sample(f"3d_dim{dim}", (r(5, 37, 6),), {"dim": dim})
    yield Sample("4d_dim1", (r(2, 3, 4, 17),), {"dim": 1})
    yield Sample("inner_long", (r(1500, 3),), {"dim": 0})
    yield Sample("0d", (r(1)[0],), {"dim": 0})
    yield Sample("1d", (r(19),), {"dim": 0})
    yield Sample("long_row", (r(2, 70001, scale=3.0),), {"dim": -1})
    yield Sample("transposed", (r(33, 9).t(),), {"dim": -1})
    yield Sample("sliced", (r(12, 80)[::2, 1:66],), {"dim": -1})
    yield Sample("offset", (r(4 * 40 + 1).reshape(-1)[1:].view(4, 40),), {"dim": -1})
    yield Sample("permuted_4d", (r(2, 5, 3, 11).permute(0, 2, 1, 3),), {"dim": -1})
    yield Sample("expanded", (r(1, 21).expand(6, 21),), {"dim": -1})
    yield Sample("large_offset", (r(6, 129, offset=300.0),), {"dim": -1})
    yield Sample("wide_range", (r(6, 129, scale=30.0),), {"dim": -1})
    special = r(8, 40)
    special[0] = -INF
    special[1, :20] = -INF
    special[2, 3] = INF
    special[3, 5] = NAN
    special[4] = 65504.0 if dtype is torch.float16 else 3e38
    special[5] = -INF
    special[5, 7] = 2.0
    yield Sample("special", (special,), {"dim": -1})
    long_special = r(2, 40000)
    long_special[:, :20000] = -INF  # whole first chunks without a finite value
    yield Sample("long_masked", (long_special,), {"dim": -1})
    if dtype is not torch.float64:
        yield Sample("to_float32", (r(4, 50),), {"dim": -1, "dtype": torch.float32})
    narrow = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    yield Sample("narrower", (r(4, 50, scale=5.0),), {"dim": -1, "dtype": narrow})
    yield Sample("narrower_dim0", (r(50, 4, scale=5.0),), {"dim": 0, "dtype": narrow})
    ties = torch.full((1500, 3), -1.0, device=device, dtype=dtype)  # each addition of the same term errs to the same side
    ties[0] = 0.0
    yield Sample("ties", (ties,), {"dim": 0})
    yield Sample("from_int", (torch.arange(24, device=device).reshape(4, 6) % 7,), {"dim": 1, "dtype": torch.float32})


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused."""
    x = torch.zeros(3, 4, device=device)
    yield ErrorSample("dim_high", (x,), {"dim": 2}, IndexError, r"dim: got 2, allowed: a number from -2 to 1")
    yield ErrorSample("dim_low", (x,), {"dim": -3}, IndexError, r"dim: got -3")
    yield ErrorSample("dim_type", (x,), {"dim": 1.0}, TypeError, r"dim: got 1\.0 of type float")
    yield ErrorSample("integers", (x.long(),), {}, RuntimeError, r"input: got torch\.int64")
    yield ErrorSample("int_dtype", (x,), {"dtype": torch.int32}, RuntimeError, r"dtype: got torch\.int32")
    yield ErrorSample("not_a_tensor", ([1.0, 2.0],), {}, TypeError, r"input: got list, allowed: a torch\.Tensor")


def fwd_bound(x: Tensor, dim: int, dtype: torch.dtype | None) -> tuple[Expected, ...]:
    """exp(x - max) errs by |x - max| ulps, the sum by sqrt(N)."""
    wide = x.double()
    y = torch.softmax(wide, dim)
    if x.numel() == 0:
        return (Expected(y, y),)
    distance = (wide - wide.amax(dim, keepdim=True)).abs()
    n = x.shape[dim] if x.dim() else 1
    return (Expected(y, (y * (n**0.5 + distance)).nan_to_num(0.0, 0.0)),)


def bwd_bound(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> tuple[Expected, ...]:
    """dx = (dy - sum(dy * y)) * y, with the sum's terms taken by magnitude."""
    g, p = dy.double(), y.double()
    n = y.shape[dim] if y.dim() else 1
    total = (g * p).sum(dim, keepdim=True)
    magnitude = (g * p).abs().sum(dim, keepdim=True)
    return (Expected((g - total) * p, n**0.5 * (g.abs() + magnitude) * p.abs()),)


_SHAPES = {
    "bert_base_attention": (12 * 32 * 512, 512),
    "bert_large_attention": (16 * 32 * 512, 512),
    "vit_large_attention": (16 * 64 * 197, 197),
    "gpt2_attention": (12 * 8 * 1024, 1024),
    "4k": (4096, 4096),
    "8k": (4096, 8192),
    "32k": (4096, 32768),
    "gpt2_vocabulary": (8192, 50257),
    "64k": (8192, 65536),
    "llama3_vocabulary": (4096, 128256),
    "gemma_vocabulary": (2048, 256000),
    "latency_140x4096": (140, 4096),
    "latency_256x1024": (256, 1024),
    "latency_1x4096": (1, 4096),
}


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(shape, device=device, dtype=dtype),), {"dim": -1}


def _bytes(case: Case) -> tuple[int, int]:
    elements = case.shape[0] * case.shape[1]
    return 2 * elements * case.dtype.itemsize, 3 * elements * case.dtype.itemsize


def _flops(case: Case) -> tuple[int, int]:
    elements = case.shape[0] * case.shape[1]
    return 5 * elements, 4 * elements


BENCH = Bench(
    make=_make,
    shapes=_SHAPES,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    bytes=_bytes,
    flops=_flops,
    baselines={"eager": F.softmax},
    headline=(
        Headline(1, ("4k", "bert_base_attention", "gpt2_vocabulary"), ("fwd", "bwd")),
        Headline(4, ("latency_140x4096",), ("fwd:wall",)),
        Headline(11, ("8k", "32k", "vit_large_attention"), ("fwd", "bwd")),
        Headline(13, ("64k", "llama3_vocabulary"), ("fwd", "bwd")),
        Headline(17, ("latency_256x1024", "latency_1x4096"), ("fwd:wall",)),
    ),
)


def audit(device: str) -> Iterator[Sample]:
    """Each row length at which a configuration changes, many rows and few, then dtypes, addresses and strides that change more."""

    def x(M: int, N: int, dtype: torch.dtype = torch.bfloat16, start: int = 0) -> Tensor:
        return empty(M, N, device=device, dtype=dtype, start=start)

    for N, dtype in cross(_AUDIT_LENGTHS, (torch.bfloat16, torch.float32)):
        yield Sample("", (x(65536, N, dtype),))
    for N in (64, 197, 256, 512):
        yield Sample("few rows", (x(33, N),))
    for N in (4096, 32768, 65536, 131072):
        yield Sample("", (x(65536, N, torch.float16),))
    for N in (40000, 57345, 69632, 114696, 122880):  # in shared memory: chunks of which some or none are held in registers
        yield Sample("", (x(65536, N),))
    for N in (1000, 16384, 32768, 65536, 131072, 262143):  # no pairs of 16-bit floats from an odd address
        yield Sample("odd address", (x(65536, N, start=1),))
    yield Sample("padded rows", (x(65536, 1008)[:, :1000],))
    yield Sample("padded to an odd stride", (x(65536, 1001)[:, :1000],))
    yield Sample("every second column", (x(65536, 2000)[:, ::2],))
    yield Sample("transposed", (x(1000, 65536).t(),))
    for N in (1000, 65536):
        yield Sample("to fp32", (x(65536, N),), {"dtype": torch.float32})
    for (N, K), dtype in cross(((197, 64), (4096, 1024)), (torch.bfloat16, torch.float32)):
        yield Sample("", (empty(16, N, K, device=device, dtype=dtype),), {"dim": 1})
    yield Sample("", (empty(16, 197, 33, device=device, dtype=torch.bfloat16),), {"dim": 1})


_AUDIT_LENGTHS = (
    64, 197, 256, 512, 1000, 4096, 8192, 16384, 32768, 50257, 65536, 131072, 128256, 256000, 262143, 524287,
)  # fmt: skip
