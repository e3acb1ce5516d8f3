"""The launches of the softmax kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.compiled import Planned
from ..._runtime.device import KERNEL_DTYPES, interpreting, properties_of
from ..._runtime.gluon import gluon_wanted
from ..._runtime.launch import launch
from ..._runtime.notices import warn_once
from ..._runtime.plans import plan
from ..._runtime.rows import at_pairs, at_vectors, empty_of, rows_and_strides
from .softmax_reference import EXACT_IN_FP32, softmax_bwd_reference, softmax_reference

FWD_SHARED_FROM, BWD_SHARED_FROM = 65536, 32768  # kernels.config.SHARED_COLUMNS, which is not imported before it is needed


@functools.cache
def _inner_kernels() -> Any:
    from ...kernels.softmax import softmax_inner

    return softmax_inner


@functools.cache
def _shared() -> Any:
    from ..._runtime.gluon import or_no_gluon
    from ...kernels.softmax import softmax_shared

    return softmax_shared, or_no_gluon


@functools.cache
def _row_kernels() -> Any:
    from ..._runtime.clusters import clusters_wanted, or_no_cluster
    from ..._runtime.tables import measured
    from ...kernels import rows
    from ...kernels.softmax import softmax, softmax_cluster, softmax_packed

    return softmax, softmax_packed, softmax_cluster, rows.row_vectors, measured, clusters_wanted, or_no_cluster


def chunked_programs(capability: tuple[int, int], sms: int, row_bytes: int) -> int:
    """kernels.config.chunked_programs, which is not imported before it is needed."""
    from ...kernels import config

    return config.chunked_programs(capability, sms, row_bytes)


def softmax_launch(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """softmax_reference by Triton kernels: one over the last dimension, one over an inner dimension."""
    out_dtype = x.dtype if dtype is None else dtype
    if torch.float64 in (x.dtype, out_dtype) or x.dim() == 0:
        if x.dim():
            warn_once("softmax", NO_FP64)
        return softmax_reference(x, dim, dtype)
    y = empty_of(x, out_dtype)
    if x.numel() == 0:
        return y
    if x.dtype not in EXACT_IN_FP32:  # integers of 32 and 64 bits: their distances from the maximum are what counts
        x = x.double()
        x = (x - x.amax(dim, keepdim=True)).float()
    elif x.dtype not in KERNEL_DTYPES:
        x = x.float()
    if dim == x.dim() - 1 or _is_last(x, dim):
        _launch_fwd_rows(x if dim == x.dim() - 1 else x.flatten(dim), y)
        return y
    x3 = _around(x, dim)
    outer, N, K = x3.shape
    planned = _inner_plan(False, N, K, x3.stride(), None, x.dtype, out_dtype, x.get_device())
    launch(planned, outer, x3, y)
    return y


def softmax_bwd_launch(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """softmax_bwd_reference by Triton kernels."""
    if torch.float64 in (dy.dtype, y.dtype, dtype) or y.dim() == 0:
        return softmax_bwd_reference(dy, y, dim, dtype)
    dx = empty_of(y, dtype)
    if y.numel() == 0:
        return dx
    if dim == y.dim() - 1 or _is_last(y, dim):
        last = dim == y.dim() - 1
        _launch_bwd_rows(dy if last else dy.flatten(dim), y if last else y.flatten(dim), dx)
        return dx
    dy3, y3 = _around(dy, dim), _around(y, dim)
    outer, N, K = y3.shape
    planned = _inner_plan(True, N, K, y3.stride(), dy3.stride(), y.dtype, dtype, y.get_device())
    launch(planned, outer, dy3, y3, dx)
    return dx


def _is_last(x: Tensor, dim: int) -> bool:
    """Whether dim is the last dimension, but for dimensions of size 1 behind it."""
    return math.prod(x.shape[dim + 1 :]) == 1


def _around(x: Tensor, dim: int) -> Tensor:
    """x as (outer, N, inner): a view where the dimensions on each side of dim collapse, else one copy."""
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))


@plan
def _inner_plan(
    backward: bool, N: int, K: int, strides: tuple[int, int, int], dy_strides: tuple[int, int, int] | None,
    dtype: torch.dtype, out_dtype: torch.dtype, device: int,
) -> Planned:  # fmt: skip
    """The launch over the middle one of (outer, N, K): of the forward with x of these strides, of the backward with y and dy."""
    inner = _inner_kernels()
    config = inner.softmax_inner_config(N, K, dtype.itemsize, *properties_of(device))
    options = {"N": N, "K": K, "BLOCK_N": config.block_n, "BLOCK_K": config.block_m, "num_warps": config.num_warps}
    given = {"y": strides, "dy": dy_strides, "dx": (N * K, K, 1)} if backward else {"x": strides, "y": (N * K, K, 1)}
    for name, of in given.items():
        options |= {f"stride_{name}{axis}": stride for axis, stride in zip("onk", of or ())}
    across = -(-K // config.block_m)
    if backward:
        return Planned(device, inner.softmax_bwd_inner_kernel, options, across=across, takes_rows=False)
    options["CHUNKED"] = config.chunked
    return Planned(device, inner.softmax_fwd_inner_kernel, options, across=across, takes_rows=False)


def _launch_fwd_rows(x: Tensor, y: Tensor) -> None:
    """Launch the forward that fits: x of rows in its last dimension, y of as many elements, contiguous."""
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    N = x.shape[-1]
    in_vectors = N > FWD_SHARED_FROM and at_vectors(rows) is True
    planned = _fwd_plan(
        (M - 1).bit_length(), N, stride_xm, stride_xn, x.dtype, y.dtype, x.get_device(), at_pairs(rows), in_vectors
    )
    launch(planned, M, rows, y)


@plan
def _fwd_plan(
    row_bits: int,
    N: int,
    stride_xm: int,
    stride_xn: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    device: int,
    in_pairs: bool,
    in_vectors: bool,
) -> Planned:
    """The launch of the forward over up to 2 ** row_bits rows. in_pairs: `at_pairs` of x; in_vectors: `at_vectors`."""
    M = 1 << row_bits
    rows, packed, cluster, row_vectors, measured, clusters_wanted, or_no_cluster = _row_kernels()
    itemsize = min(dtype.itemsize, out_dtype.itemsize)
    again = functools.partial(_fwd_plan, *(row_bits, N, stride_xm, stride_xn, dtype, out_dtype, device, in_pairs, in_vectors))
    vec, edges, same = row_vectors(N, itemsize, stride_xn, (stride_xm, N))
    packable = in_pairs and dtype is out_dtype and itemsize == 2 and vec > 1 and same
    wanted = in_vectors and packable and gluon_wanted(device)
    shared = _shared()[0].softmax_shared_config("softmax_fwd", N, edges) if wanted else None
    config = measured("softmax_fwd", M, N, itemsize, device, packable, shared is not None) or shared
    config = config or rows.softmax_fwd_config(M, N, itemsize, *properties_of(device), packable, clusters_wanted(device), edges)
    if edges and N <= rows.SHORT_FWD and rows.element_wise(config):
        vec, edges, same = 1, False, False
    options = {
        "N": N, "stride_xm": stride_xm, "stride_ym": N, "VEC": vec, "EDGES": edges,
        "BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.variant == "shared":
        kernels, or_no_gluon = _shared()
        options = {"N": N, "stride_xm": stride_xm, "stride_ym": N, "VEC": vec, **kernels.placement(N, 1)}
        return or_no_gluon(Planned(device, kernels.softmax_fwd_shared_kernel, options, most=properties_of(device)[1]), again)
    if config.num_ctas > 1:
        options["num_ctas"] = config.num_ctas
    if config.variant == "packed":
        options |= {"BF16": dtype is torch.bfloat16, "ASM": not interpreting()}
        planned = Planned(device, packed.softmax_fwd_packed_kernel, options, takes_rows=False)
        return or_no_cluster(planned, again) if config.num_ctas > 1 else planned
    options |= {"stride_xn": stride_xn, "SAME": same}
    if config.num_ctas > 1:
        return or_no_cluster(Planned(device, cluster.softmax_fwd_cluster_kernel, options, takes_rows=False), again)
    if config.variant == "chunked":
        most = chunked_programs(*properties_of(device), N * dtype.itemsize)
        options["NUM_STAGES"] = 2 if most else config.num_stages  # few programs keep memory busy only if they prefetch
        return Planned(device, rows.softmax_fwd_chunked_kernel, options, most=most)
    return Planned(device, rows.softmax_fwd_kernel, {**options, "BLOCK_M": config.block_m}, block=config.block_m)


def _launch_bwd_rows(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    """Launch the backward that fits: dy, y of rows in their last dimension, dx of as many elements, contiguous."""
    dy_rows, M, stride_dym, stride_dyn = rows_and_strides(dy)
    y_rows, _, stride_ym, stride_yn = rows_and_strides(y)
    strides = (stride_dym, stride_dyn, stride_ym, stride_yn)
    in_pairs = at_pairs(dy_rows) and at_pairs(y_rows)
    N = y.shape[-1]
    in_vectors = N > BWD_SHARED_FROM and at_vectors(dy_rows, y_rows) is True
    planned = _bwd_plan((M - 1).bit_length(), N, *strides, dy.dtype, y.dtype, dx.dtype, y.get_device(), in_pairs, in_vectors)
    launch(planned, M, dy_rows, y_rows, dx)


@plan
def _bwd_plan(
    row_bits: int, N: int, stride_dym: int, stride_dyn: int, stride_ym: int, stride_yn: int,
    dy_dtype: torch.dtype, y_dtype: torch.dtype, dx_dtype: torch.dtype, device: int, in_pairs: bool, in_vectors: bool,
) -> Planned:  # fmt: skip
    """The launch of the backward over up to 2 ** row_bits rows. in_pairs: `at_pairs` of dy and y; in_vectors: `at_vectors`."""
    M = 1 << row_bits
    rows, packed, cluster, row_vectors, measured, clusters_wanted, or_no_cluster = _row_kernels()
    itemsize = min(dy_dtype.itemsize, y_dtype.itemsize, dx_dtype.itemsize)
    again = functools.partial(
        _bwd_plan, row_bits, N, stride_dym, stride_dyn, stride_ym, stride_yn, dy_dtype, y_dtype, dx_dtype, device, in_pairs, in_vectors
    )  # fmt: skip
    vec, edges, same = row_vectors(N, itemsize, 1 if stride_dyn == stride_yn == 1 else 0, (stride_dym, stride_ym, N))
    if edges and not same:
        vec, edges = 1, False
    packable = in_pairs and dy_dtype is y_dtype is dx_dtype and itemsize == 2 and vec > 1
    wanted = in_vectors and packable and gluon_wanted(device)
    shared = _shared()[0].softmax_shared_config("softmax_bwd", N, edges) if wanted else None
    config = measured("softmax_bwd", M, N, itemsize, device, packable, shared is not None) or shared
    config = config or rows.softmax_bwd_config(M, N, itemsize, *properties_of(device), packable, clusters_wanted(device), edges)
    if edges and N <= rows.SHORT_BWD and rows.element_wise(config):
        vec, edges, same = 1, False, False
    options = {
        "N": N, "stride_dym": stride_dym, "stride_ym": stride_ym, "stride_dxm": N, "VEC": vec, "EDGES": edges,
        "BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.variant == "shared":
        kernels, or_no_gluon = _shared()
        strides = {"N": N, "stride_dym": stride_dym, "stride_ym": stride_ym, "stride_dxm": N}
        options = {**strides, "VEC": vec, "EDGES": edges, **kernels.placement(N, 2)}
        return or_no_gluon(Planned(device, kernels.softmax_bwd_shared_kernel, options, most=properties_of(device)[1]), again)
    if config.num_ctas > 1:
        options["num_ctas"] = config.num_ctas
    if config.variant == "packed":
        options |= {"BF16": y_dtype is torch.bfloat16, "ASM": not interpreting()}
        planned = Planned(device, packed.softmax_bwd_packed_kernel, options, takes_rows=False)
        return or_no_cluster(planned, again) if config.num_ctas > 1 else planned
    options |= {"stride_dyn": stride_dyn, "stride_yn": stride_yn, "SAME": same}
    if config.num_ctas > 1:
        return or_no_cluster(Planned(device, cluster.softmax_bwd_cluster_kernel, options, takes_rows=False), again)
    if config.variant == "chunked":
        return Planned(device, rows.softmax_bwd_chunked_kernel, options, takes_rows=False)
    return Planned(device, rows.softmax_bwd_kernel, {**options, "BLOCK_M": config.block_m}, block=config.block_m)
