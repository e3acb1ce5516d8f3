"""Softmax: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...._torch.spec import AuditCase, Bench, Case, ErrorSample, Expected, Headline, Sample
from ...case_builders import audit_case, cross, randn, tagged

INF, NAN = float("inf"), float("nan")


@tagged("rows(7, 255)", addressing=("long_row", "long_masked", "inner_long", "wide_range", "sliced", "offset", "transposed"))
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


def audit(capability: tuple[int, int]) -> Iterator[AuditCase]:
    """Every configuration the choosers can return, by row length."""
    from ....kernels.config import CLUSTER_TRITON, has_clusters
    from ....kernels.softmax import softmax, softmax_inner

    M, sms = 65536, 132
    for N, dtype in cross((64, 197, 256, 512, 1000, 4096, 8192, 16384, 32768, 50257, 65536, 131072), _AUDIT_DTYPES):
        for packable in (True, False):
            yield _audit_rows(False, softmax.softmax_fwd_config(M, N, dtype.itemsize, capability, sms, packable), M, N, dtype)
            yield _audit_rows(True, softmax.softmax_bwd_config(M, N, dtype.itemsize, capability, sms, packable), M, N, dtype)
    lengths = (50257, 65536, 128256, 256000, 262143, 524287) if has_clusters(capability, CLUSTER_TRITON) else ()
    for N, (dtype, packable) in cross(lengths, cross(_AUDIT_DTYPES, (True, False))):
        for backward, chooser in ((False, softmax.softmax_fwd_config), (True, softmax.softmax_bwd_config)):
            config = chooser(M, N, dtype.itemsize, capability, sms, packable, True)
            if config.num_ctas > 1:
                yield _audit_rows(backward, config, M, N, dtype)
    for (N, K), dtype in cross(((197, 64), (4096, 1024)), _AUDIT_DTYPES):
        config = softmax_inner.softmax_inner_config(N, K, dtype.itemsize, capability, sms)
        three = {"o": N * K, "n": K, "k": 1}
        blocks = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_m}
        args = {"x_ptr": "*x", "y_ptr": "*x", "N": N, "K": K}
        args |= {f"stride_{t}{a}": s for t in ("x", "y") for a, s in three.items()}
        blocks_fwd = {**blocks, "CHUNKED": config.chunked}
        yield audit_case(softmax_inner.softmax_fwd_inner_kernel, f"N={N} K={K}", dtype, args, blocks_fwd, config.num_warps)
        args = {"dy_ptr": "*x", "y_ptr": "*x", "dx_ptr": "*x", "N": N, "K": K}
        args |= {f"stride_{t}{a}": s for t in ("dy", "y", "dx") for a, s in three.items()}
        yield audit_case(softmax_inner.softmax_bwd_inner_kernel, f"N={N} K={K}", dtype, args, blocks, config.num_warps)


def _audit_rows(backward: bool, config: Any, M: int, N: int, dtype: torch.dtype) -> AuditCase:
    """The kernel that config stands for, on contiguous rows."""
    from ....kernels import rows
    from ....kernels.softmax import softmax, softmax_cluster, softmax_packed

    names = ("dy", "y", "dx") if backward else ("x", "y")
    vec, edges, same = rows.row_vectors(N, dtype.itemsize, 1, (N,))
    args: dict[str, Any] = {f"{name}_ptr": "*x" for name in names} | {"M": M, "N": N}
    args |= {f"stride_{name}m": N for name in names} | {f"stride_{name}n": 1 for name in names[:-1]}
    constexprs = {"VEC": vec, "EDGES": edges, "SAME": same, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constexprs |= {"BF16": dtype is torch.bfloat16, "ASM": True}
    module, suffix = {
        "one_pass": (softmax_cluster, "_cluster") if config.num_ctas > 1 else (softmax, ""),
        "packed": (softmax_packed, "_packed"),
        "chunked": (softmax, "_chunked"),
    }[config.variant]
    kernel = getattr(module, f"softmax_{'bwd' if backward else 'fwd'}{suffix}_kernel")
    wanted = set(kernel.arg_names)
    args = {k: v for k, v in args.items() if k in wanted}
    constexprs = {k: v for k, v in constexprs.items() if k in wanted}
    return audit_case(kernel, f"N={N}", dtype, args, constexprs, config.num_warps, aligned=vec > 1, num_ctas=config.num_ctas)


_AUDIT_DTYPES = (torch.bfloat16, torch.float32)
