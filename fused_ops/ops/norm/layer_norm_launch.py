"""The launches of the layer norm kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.compiled import Planned
from ..._runtime.device import KERNEL_DTYPES, device_properties, properties_of
from ..._runtime.launch import launch, launch_planned
from ..._runtime.notices import warn_once
from ..._runtime.plans import plan
from ..._runtime.rows import column_sums, empty_of, rows_and_strides, rows_of
from .layer_norm_reference import layer_norm_bwd_reference, layer_norm_reference


@functools.cache
def _kernels() -> Any:
    from ..._runtime.tables import measured
    from ...kernels import rows
    from ...kernels.norm import layer_norm, layer_norm_bwd

    return layer_norm, layer_norm_bwd, rows, measured


@functools.cache
def _clusters() -> Any:
    from ..._runtime.clusters import clusters_wanted
    from ...kernels.norm import layer_norm_cluster

    return layer_norm_cluster, clusters_wanted


def layer_norm_launch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """layer_norm_reference by Triton kernels."""
    if x.dtype not in KERNEL_DTYPES:
        warn_once("layer_norm", NO_FP64)
        return layer_norm_reference(x, weight, bias, eps)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    y = empty_of(x, x.dtype)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    _launch_fwd(x, weight, bias, y, mean, rstd, eps)
    return y, mean, rstd


def _launch_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, mean: Tensor | None, rstd: Tensor | None, eps: float
) -> None:
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    w_dtype, b_dtype = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    stats = mean is not None
    planned = _fwd_plan(
        M, x.shape[-1], stride_xm, stride_xn, float(eps), x.dtype, w_dtype, b_dtype, stats, x.get_device()
    )  # fmt: skip
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    launch_planned(planned, rows, weight, bias, y, x if mean is None else mean, x if rstd is None else rstd)


@plan
def _fwd_plan(
    M: int, N: int, stride_xm: int, stride_xn: int, eps: float,
    dtype: torch.dtype, w_dtype: torch.dtype | None, b_dtype: torch.dtype | None, stats: bool, device: int,
) -> Planned:  # fmt: skip
    """The launch of the forward. w_dtype, b_dtype: None without a weight, a bias."""
    fwd, _, rows, measured = _kernels()
    itemsize = dtype.itemsize
    vec, edges, same = rows.row_vectors(N, itemsize, stride_xn, (stride_xm, N))
    config = measured("layer_norm_fwd", M, N, itemsize, device)
    cluster, clusters_wanted = _clusters()
    if config is None:
        config = fwd.layer_norm_fwd_config(M, N, itemsize, *properties_of(device), vec > 1 and not edges)
        if vec > 1 and not edges and clusters_wanted(device):
            config = cluster.layer_norm_fwd_cluster_config(config, N)
    options = {
        "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_ym": N, "eps": eps,
        "HAS_WEIGHT": w_dtype is not None, "HAS_BIAS": b_dtype is not None, "STATS": stats, "VEC": vec, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.num_ctas > 1:
        options |= {"VEC": 1 if edges else vec, "num_ctas": config.num_ctas}
        return Planned(device, cluster.layer_norm_fwd_cluster_kernel, M, (N,), options)
    options |= {"EDGES": edges, "SAME": same}
    if config.chunked:
        return Planned(device, fwd.layer_norm_fwd_chunked_kernel, M, (N,), options)
    tiles = rows.row_tiles(M, config.block_m, vec if edges else 1)
    return Planned(device, fwd.layer_norm_fwd_kernel, tiles, (M, N), {**options, "BLOCK_M": config.block_m})


def infer_launch(x: Tensor, shape: tuple[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch.layer_norm over the last dimension, of size shape[0], by a kernel: y alone, without statistics."""
    if x.dtype not in KERNEL_DTYPES:
        return torch.layer_norm(x, shape, weight, bias, eps)
    y = empty_of(x, x.dtype)
    if x.numel() != 0:
        _launch_fwd(x, weight, bias, y, None, None, eps)
    return y


def layer_norm_bwd_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_dx: bool, need_dw: bool, need_db: bool, bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """layer_norm_bwd_reference by Triton kernels; the same bits on every run."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        return layer_norm_bwd_reference(dy, x, weight, mean, rstd, need_dx, need_dw, need_db, bias_dtype)
    _, bwd, rows, measured = _kernels()
    N = x.shape[-1]
    dy2, x2 = rows_of(dy), rows_of(x)
    M = x2.shape[0]
    weight = weight if weight is None else weight.contiguous()
    capability, sms = device_properties(x)
    column_stride = 1 if dy2.stride(1) == x2.stride(1) == 1 else 0
    vec = rows.whole_vectors(N, x.element_size(), column_stride, (dy2.stride(0), x2.stride(0), N))
    config = measured("layer_norm_bwd", M, N, x.element_size(), x.get_device())
    config = config or bwd.layer_norm_bwd_config(M, N, x.element_size(), capability, sms, vec > 1)
    programs = bwd.layer_norm_bwd_programs(M, config, sms)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else x.new_empty((0,))
    parts = torch.empty((int(need_dw) + int(need_db), programs, N), dtype=torch.float32, device=x.device)
    dw_part = parts[0] if need_dw else parts
    db_part = parts[-1] if need_db else parts
    launch(
        bwd.layer_norm_bwd_chunked_kernel if config.chunked else bwd.layer_norm_bwd_kernel, programs, x,
        dy2, x2, x if weight is None else weight, mean, rstd, dx, dw_part, db_part, M, N,
        stride_dym=dy2.stride(0), stride_dyn=dy2.stride(1), stride_xm=x2.stride(0), stride_xn=x2.stride(1), stride_dxm=N,
        HAS_WEIGHT=weight is not None, NEED_DX=need_dx, NEED_DW=need_dw, NEED_DB=need_db,
        VEC=vec, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip

    dw_dtype = x.dtype if weight is None else weight.dtype
    db_dtype = x.dtype if bias_dtype is None else bias_dtype
    sums = column_sums(parts, dw_dtype if need_dw else db_dtype, db_dtype) if need_dw or need_db else []
    return dx, sums[0] if need_dw else x.new_empty((0,)), sums[-1] if need_db else x.new_empty((0,))
