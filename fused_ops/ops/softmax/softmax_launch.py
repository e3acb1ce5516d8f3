"""The launches of the softmax kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.compiled import Planned
from ..._runtime.device import device_properties, interpreting, properties_of
from ..._runtime.launch import launch, launch_planned
from ..._runtime.notices import warn_once
from ..._runtime.plans import plan
from ..._runtime.rows import at_pairs, empty_of, rows_and_strides
from .softmax_reference import softmax_bwd_reference, softmax_reference


@functools.cache
def _inner_kernels() -> Any:
    from ...kernels.softmax import softmax_inner

    return softmax_inner


@functools.cache
def _row_kernels() -> Any:
    from ..._runtime.clusters import clusters_wanted
    from ..._runtime.tables import measured
    from ...kernels import rows
    from ...kernels.softmax import softmax, softmax_cluster, softmax_packed

    return softmax, softmax_packed, softmax_cluster, rows.row_vectors, measured, clusters_wanted


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
    if not x.is_floating_point():
        x = x.float()
    if dim == x.dim() - 1 or _is_last(x, dim):
        _launch_fwd_rows(x if dim == x.dim() - 1 else x.flatten(dim), y)
        return y
    inner = _inner_kernels()
    N = x.shape[dim]
    x3, y3 = _around(x, dim), _around(y, dim)
    K = x3.shape[2]
    config = inner.softmax_inner_config(N, K, x.element_size(), *device_properties(x))
    launch(
        inner.softmax_fwd_inner_kernel, x3.shape[0] * -(-K // config.block_m), x, x3, y3, N, K,
        **_strides("x", x3), **_strides("y", y3),
        BLOCK_N=config.block_n, BLOCK_K=config.block_m, CHUNKED=config.chunked, num_warps=config.num_warps,
    )  # fmt: skip
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
    inner = _inner_kernels()
    N = y.shape[dim]
    dy3, y3, dx3 = _around(dy, dim), _around(y, dim), _around(dx, dim)
    K = y3.shape[2]
    config = inner.softmax_inner_config(N, K, y.element_size(), *device_properties(y))
    launch(
        inner.softmax_bwd_inner_kernel, y3.shape[0] * -(-K // config.block_m), y, dy3, y3, dx3, N, K,
        **_strides("dy", dy3), **_strides("y", y3), **_strides("dx", dx3),
        BLOCK_N=config.block_n, BLOCK_K=config.block_m, num_warps=config.num_warps,
    )  # fmt: skip
    return dx


def _is_last(x: Tensor, dim: int) -> bool:
    """Whether dim is the last dimension, but for dimensions of size 1 behind it."""
    return math.prod(x.shape[dim + 1 :]) == 1


def _around(x: Tensor, dim: int) -> Tensor:
    """x as (outer, N, inner): a view where the dimensions on each side of dim collapse, else one copy."""
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": stride for axis, stride in zip("onk", x.stride())}


def _launch_fwd_rows(x: Tensor, y: Tensor) -> None:
    """Launch the forward that fits: x of rows in its last dimension, y of as many elements, contiguous."""
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    planned = _fwd_plan(M, x.shape[-1], stride_xm, stride_xn, x.dtype, y.dtype, x.get_device(), at_pairs(rows))
    launch_planned(planned, rows, y)


@plan
def _fwd_plan(
    M: int, N: int, stride_xm: int, stride_xn: int, dtype: torch.dtype, out_dtype: torch.dtype, device: int, in_pairs: bool
) -> Planned:
    """The launch of the forward over rows. in_pairs: `at_pairs` of x."""
    rows, packed, cluster, row_vectors, measured, clusters_wanted = _row_kernels()
    itemsize = min(dtype.itemsize, out_dtype.itemsize)
    vec, edges, same = row_vectors(N, itemsize, stride_xn, (stride_xm, N))
    packable = in_pairs and dtype is out_dtype and itemsize == 2 and vec > 1 and same
    config = measured("softmax_fwd", M, N, itemsize, device, packable)
    config = config or rows.softmax_fwd_config(M, N, itemsize, *properties_of(device), packable, clusters_wanted(device))
    options = {
        "stride_xm": stride_xm, "stride_ym": N, "VEC": vec, "EDGES": edges,
        "BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.num_ctas > 1:
        options["num_ctas"] = config.num_ctas
    if config.variant == "packed":
        options |= {"BF16": dtype is torch.bfloat16, "ASM": not interpreting()}
        return Planned(device, packed.softmax_fwd_packed_kernel, M, (N,), options)
    options |= {"stride_xn": stride_xn, "SAME": same}
    if config.num_ctas > 1:
        return Planned(device, cluster.softmax_fwd_cluster_kernel, M, (N,), options)
    if config.variant == "chunked":
        return Planned(device, rows.softmax_fwd_chunked_kernel, M, (N,), options)
    return Planned(device, rows.softmax_fwd_kernel, -(-M // config.block_m), (M, N), {**options, "BLOCK_M": config.block_m})


def _launch_bwd_rows(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    """Launch the backward that fits: dy, y of rows in their last dimension, dx of as many elements, contiguous."""
    dy_rows, M, stride_dym, stride_dyn = rows_and_strides(dy)
    y_rows, _, stride_ym, stride_yn = rows_and_strides(y)
    strides = (stride_dym, stride_dyn, stride_ym, stride_yn)
    in_pairs = at_pairs(dy_rows) and at_pairs(y_rows)
    planned = _bwd_plan(M, y.shape[-1], *strides, dy.dtype, y.dtype, dx.dtype, y.get_device(), in_pairs)
    launch_planned(planned, dy_rows, y_rows, dx)


@plan
def _bwd_plan(
    M: int, N: int, stride_dym: int, stride_dyn: int, stride_ym: int, stride_yn: int,
    dy_dtype: torch.dtype, y_dtype: torch.dtype, dx_dtype: torch.dtype, device: int, in_pairs: bool,
) -> Planned:  # fmt: skip
    """The launch of the backward over rows. in_pairs: `at_pairs` of dy and y."""
    rows, packed, cluster, row_vectors, measured, clusters_wanted = _row_kernels()
    itemsize = min(dy_dtype.itemsize, y_dtype.itemsize, dx_dtype.itemsize)
    vec, edges, same = row_vectors(N, itemsize, 1 if stride_dyn == stride_yn == 1 else 0, (stride_dym, stride_ym, N))
    if edges and not same:
        vec, edges = 1, False
    packable = in_pairs and dy_dtype is y_dtype is dx_dtype and itemsize == 2 and vec > 1
    config = measured("softmax_bwd", M, N, itemsize, device, packable)
    config = config or rows.softmax_bwd_config(M, N, itemsize, *properties_of(device), packable, clusters_wanted(device))
    options = {
        "stride_dym": stride_dym, "stride_ym": stride_ym, "stride_dxm": N, "VEC": vec, "EDGES": edges,
        "BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.num_ctas > 1:
        options["num_ctas"] = config.num_ctas
    if config.variant == "packed":
        options |= {"BF16": y_dtype is torch.bfloat16, "ASM": not interpreting()}
        return Planned(device, packed.softmax_bwd_packed_kernel, M, (N,), options)
    options |= {"stride_dyn": stride_dyn, "stride_yn": stride_yn, "SAME": same}
    if config.num_ctas > 1:
        return Planned(device, cluster.softmax_bwd_cluster_kernel, M, (N,), options)
    if config.variant == "chunked":
        return Planned(device, rows.softmax_bwd_chunked_kernel, M, (N,), options)
    return Planned(device, rows.softmax_bwd_kernel, -(-M // config.block_m), (M, N), {**options, "BLOCK_M": config.block_m})
