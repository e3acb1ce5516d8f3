"""The launches of the layer norm kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.compiled import Planned
from ..._runtime.device import KERNEL_DTYPES, properties_of
from ..._runtime.gluon import gluon_wanted
from ..._runtime.launch import launch
from ..._runtime.notices import warn_once
from ..._runtime.plans import MANY_ROWS, plan
from ..._runtime.rows import at_vectors, column_sum, column_sums, empty_of, rows_and_strides
from .layer_norm_reference import layer_norm_bwd_reference, layer_norm_eager, layer_norm_reference
from .wide_launch import columns_plan, launch_columns

BWD_SHARED_FROM = 8192  # columns: kernels.config.SHARED_COLUMNS, which is not imported before it is needed


@functools.cache
def _kernels() -> Any:
    from ..._runtime.tables import measured
    from ...kernels import rows
    from ...kernels.norm import layer_norm, layer_norm_bwd

    return layer_norm, layer_norm_bwd, rows, measured


@functools.cache
def _shared() -> Any:
    from ..._runtime.gluon import or_no_gluon
    from ...kernels.norm import layer_norm_bwd_shared

    return layer_norm_bwd_shared, or_no_gluon


@functools.cache
def _clusters() -> Any:
    from ..._runtime.clusters import clusters_wanted, or_no_cluster
    from ...kernels.norm import layer_norm_cluster

    return layer_norm_cluster, clusters_wanted, or_no_cluster


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


def infer_launch(x: Tensor, shape: tuple[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch.layer_norm over the last dimension, of size shape[0], by a kernel: y alone, without statistics."""
    if x.dtype not in KERNEL_DTYPES:
        return layer_norm_eager(x, [shape[0]], weight, bias, eps)
    y = empty_of(x, x.dtype)
    if x.numel() != 0:
        _launch_fwd(x, weight, bias, y, None, None, eps)
    return y


def _launch_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, mean: Tensor | None, rstd: Tensor | None, eps: float
) -> None:
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    w_dtype, b_dtype = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    planned = _fwd_plan(
        (M - 1).bit_length(), x.shape[-1], stride_xm, stride_xn, float(eps), x.dtype, w_dtype, b_dtype, mean is not None, x.get_device()
    )  # fmt: skip
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    launch(planned, M, rows, weight, bias, y, x if mean is None else mean, x if rstd is None else rstd)


@plan
def _fwd_plan(
    row_bits: int, N: int, stride_xm: int, stride_xn: int, eps: float,
    dtype: torch.dtype, w_dtype: torch.dtype | None, b_dtype: torch.dtype | None, stats: bool, device: int,
) -> Planned:  # fmt: skip
    """The launch of the forward over up to 2 ** row_bits rows. w_dtype, b_dtype: None without a weight, a bias."""
    M = 1 << row_bits
    fwd, _, rows, measured = _kernels()
    itemsize = dtype.itemsize
    vec, edges, same = rows.row_vectors(N, itemsize, stride_xn, (stride_xm, N))
    config = measured("layer_norm_fwd", M, N, itemsize, device)
    cluster, clusters_wanted, or_no_cluster = _clusters()
    if config is None:
        config = fwd.layer_norm_fwd_config(M, N, itemsize, *properties_of(device), vec > 1 and not edges)
        if vec > 1 and not edges and clusters_wanted(device):
            config = cluster.layer_norm_fwd_cluster_config(config, N)
    options = {
        "N": N, "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_ym": N, "eps": eps,
        "HAS_WEIGHT": w_dtype is not None, "HAS_BIAS": b_dtype is not None, "STATS": stats, "VEC": vec, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.num_ctas > 1:
        options |= {"VEC": 1 if edges else vec, "num_ctas": config.num_ctas}
        planned = Planned(device, cluster.layer_norm_fwd_cluster_kernel, options, takes_rows=False)
        again = (row_bits, N, stride_xm, stride_xn, eps, dtype, w_dtype, b_dtype, stats, device)
        return or_no_cluster(planned, functools.partial(_fwd_plan, *again))
    options |= {"EDGES": edges, "SAME": same}
    if config.chunked:
        return Planned(device, fwd.layer_norm_fwd_chunked_kernel, options, takes_rows=False)
    options["BLOCK_M"] = config.block_m
    return Planned(device, fwd.layer_norm_fwd_kernel, options, block=config.block_m, step=vec if edges else 1)


def layer_norm_bwd_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_dx: bool, need_dw: bool, need_db: bool, bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """layer_norm_bwd_reference by Triton kernels; the same bits on every run."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        return layer_norm_bwd_reference(dy, x, weight, mean, rstd, need_dx, need_dw, need_db, bias_dtype)
    dy2, M, stride_dym, stride_dyn = rows_and_strides(dy)
    x2, _, stride_xm, stride_xn = rows_and_strides(x)
    N = x.shape[-1]
    w_dtype = None if weight is None else weight.dtype
    in_vectors = N > BWD_SHARED_FROM and need_dx and at_vectors(dy2, x2, x2 if weight is None else weight) is True
    planned = _bwd_plan(
        (M - 1).bit_length(), N, stride_dym, stride_dyn, stride_xm, stride_xn, dy.dtype, x.dtype, w_dtype, need_dx, need_dw, need_db,
        x.get_device(), in_vectors,
    )  # fmt: skip
    none = x if need_dx and need_dw and need_db else x.new_empty((0,))
    dx = empty_of(x, x.dtype) if need_dx else none
    parts = x.new_empty((int(need_dw) + int(need_db), planned.grid(M) // planned.across, N), dtype=torch.float32)
    db_part = parts[1] if need_dw and need_db else parts
    run = launch if planned.across == 1 else launch_columns
    run(planned, M, dy2, x2, x if weight is None else weight.contiguous(), mean, rstd, dx, parts, db_part)
    dw_dtype = x.dtype if w_dtype is None else w_dtype
    db_dtype = x.dtype if bias_dtype is None else bias_dtype
    if need_dw and need_db:
        return dx, *column_sums(parts, dw_dtype, db_dtype)
    return dx, column_sum(parts[0], dw_dtype) if need_dw else none, column_sum(parts[0], db_dtype) if need_db else none


@plan
def _bwd_plan(
    row_bits: int, N: int, stride_dym: int, stride_dyn: int, stride_xm: int, stride_xn: int, dy_dtype: torch.dtype, dtype: torch.dtype,
    w_dtype: torch.dtype | None, need_dx: bool, need_dw: bool, need_db: bool, device: int,
    in_vectors: bool,
) -> Planned:  # fmt: skip
    """The launch of the backward over up to 2 ** row_bits rows; its grid over `across` is the number of partial rows.

    in_vectors: `at_vectors` of dy, x and the weight.
    """
    M = 1 << row_bits
    _, bwd, rows, measured = _kernels()
    capability, sms = properties_of(device)
    column_stride = 1 if stride_dyn == stride_xn == 1 else 0
    vec = rows.whole_vectors(N, dtype.itemsize, column_stride, (stride_dym, stride_xm, N))
    wanted = in_vectors and vec > 1 and dy_dtype is dtype and dtype.itemsize == 2 and gluon_wanted(device)
    in_shared = _shared()[0].layer_norm_bwd_shared_config(N, capability) if wanted else None
    config = measured("layer_norm_bwd", M, N, dtype.itemsize, device, shareable=in_shared is not None) or in_shared
    config = config or bwd.layer_norm_bwd_config(M, N, dtype.itemsize, capability, sms, vec > 1)
    options = {
        "N": N, "stride_dym": stride_dym, "stride_dyn": stride_dyn, "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_dxm": N,
        "HAS_WEIGHT": w_dtype is not None, "NEED_DX": need_dx, "NEED_DW": need_dw, "NEED_DB": need_db,
        "VEC": vec, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "NUM_STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }  # fmt: skip
    if config.variant == "shared":
        shared, or_no_gluon = _shared()
        options = {name: value for name, value in options.items() if name in shared.layer_norm_bwd_shared_kernel.arg_names}
        planned = Planned(device, shared.layer_norm_bwd_shared_kernel, options | shared.placement(N), most=sms)
        again = (
            row_bits, N, stride_dym, stride_dyn, stride_xm, stride_xn, dy_dtype, dtype, w_dtype, need_dx, need_dw, need_db, device,
            in_vectors,
        )  # fmt: skip
        return or_no_gluon(planned, functools.partial(_bwd_plan, *again))
    if config.chunked:
        return columns_plan(config, options, device, sms, centred=True)
    most = bwd.layer_norm_bwd_programs(MANY_ROWS, config, sms)
    return Planned(device, bwd.layer_norm_bwd_kernel, options, block=config.block_m, most=most)
