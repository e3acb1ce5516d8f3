"""The launches of the RMS norm kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.compiled import Planned
from ..._runtime.device import KERNEL_DTYPES, properties_of
from ..._runtime.launch import launch
from ..._runtime.notices import warn_once
from ..._runtime.plans import MANY_ROWS, plan
from ..._runtime.rows import column_sum, empty_of, rows_and_strides
from .rms_norm_reference import eps_of, rms_norm_bwd_reference, rms_norm_reference, rms_norm_rows
from .wide_launch import columns_plan, launch_columns


@functools.cache
def _kernels() -> Any:
    from ..._runtime.tables import measured
    from ...kernels import rows
    from ...kernels.norm import rms_norm

    return rms_norm, rows, measured


def rms_norm_launch(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm_reference by a Triton kernel."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        return _without_a_kernel(rms_norm_reference, x, weight, eps)
    y, rstd = empty_of(x, x.dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _launch_fwd(x, weight, y, rstd, eps)
    return y, rstd


def infer_launch(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None) -> Tensor:
    """F.rms_norm over the last dimension, of size shape[0], by a kernel: y alone."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        return _without_a_kernel(rms_norm_rows, x, weight, eps_of(x, eps))
    y = empty_of(x, x.dtype)
    _launch_fwd(x, weight, y, None, eps_of(x, eps))
    return y


def _without_a_kernel(reference: Any, x: Tensor, *args: Any) -> Any:
    if x.numel():
        warn_once("rms_norm", NO_FP64)
    return reference(x, *args)


def _launch_fwd(x: Tensor, weight: Tensor | None, y: Tensor, rstd: Tensor | None, eps: float) -> None:
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    planned = _fwd_plan(
        (M - 1).bit_length(), x.shape[-1], stride_xm, stride_xn, float(eps), x.dtype, None if weight is None else weight.dtype,
        rstd is not None, x.get_device(),
    )  # fmt: skip
    launch(planned, M, rows, x if weight is None else weight.contiguous(), y, x if rstd is None else rstd)


@plan
def _fwd_plan(
    row_bits: int, N: int, stride_xm: int, stride_xn: int, eps: float, dtype: torch.dtype, w_dtype: torch.dtype | None,
    stats: bool, device: int,
) -> Planned:  # fmt: skip
    """The launch of the forward over up to 2 ** row_bits rows. w_dtype: None without a weight."""
    kernels, rows, measured = _kernels()
    M = 1 << row_bits
    vec, edges, same = rows.row_vectors(N, dtype.itemsize, stride_xn, (stride_xm, N))
    config = measured("rms_norm_fwd", M, N, dtype.itemsize, device)
    if config is None:
        wide_weight = w_dtype is not None and w_dtype.itemsize > dtype.itemsize
        whole = vec > 1 and not edges
        config = kernels.rms_norm_fwd_config(M, N, dtype.itemsize, *properties_of(device), whole, wide_weight)
    options = {
        "N": N, "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_ym": N, "eps": eps,
        "HAS_WEIGHT": w_dtype is not None, "STATS": stats, "VEC": vec, "EDGES": edges, "SAME": same, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.chunked:
        return Planned(device, kernels.rms_norm_fwd_chunked_kernel, options, takes_rows=False)
    options["BLOCK_M"] = config.block_m
    return Planned(device, kernels.rms_norm_fwd_kernel, options, block=config.block_m, step=vec if edges else 1)


def rms_norm_bwd_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """rms_norm_bwd_reference by Triton kernels; the same bits on every run."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        return rms_norm_bwd_reference(dy, x, weight, rstd, need_dx, need_dw)
    dy2, M, stride_dym, stride_dyn = rows_and_strides(dy)
    x2, _, stride_xm, stride_xn = rows_and_strides(x)
    N, w_dtype = x.shape[-1], None if weight is None else weight.dtype
    planned = _bwd_plan(
        (M - 1).bit_length(), N, stride_dym, stride_dyn, stride_xm, stride_xn, dy.dtype, x.dtype, w_dtype, need_dx, need_dw,
        x.get_device(),
    )  # fmt: skip
    none = x if need_dx and need_dw else x.new_empty((0,))
    dx = empty_of(x, x.dtype) if need_dx else none
    part = x.new_empty((planned.grid(M) // planned.across, N), dtype=torch.float32) if need_dw else dx
    w = x if weight is None else weight.contiguous()
    if planned.across == 1:
        launch(planned, M, dy2, x2, w, rstd, dx, part)
    else:
        launch_columns(planned, M, dy2, x2, w, rstd, rstd, dx, part, part)
    return dx, column_sum(part, x.dtype if w_dtype is None else w_dtype) if need_dw else none


@plan
def _bwd_plan(
    row_bits: int, N: int, stride_dym: int, stride_dyn: int, stride_xm: int, stride_xn: int, dy_dtype: torch.dtype,
    dtype: torch.dtype, w_dtype: torch.dtype | None, need_dx: bool, need_dw: bool, device: int,
) -> Planned:  # fmt: skip
    """The launch of the backward over up to 2 ** row_bits rows; its grid over `across` is the number of partial rows."""
    kernels, rows, measured = _kernels()
    M, (capability, sms) = 1 << row_bits, properties_of(device)
    strided = stride_dyn != 1 or stride_xn != 1
    vec = rows.whole_vectors(N, dtype.itemsize, 0 if strided else 1, (stride_dym, stride_xm, N))
    config = measured("rms_norm_bwd", M, N, dtype.itemsize, device)
    config = config or kernels.rms_norm_bwd_config(M, N, dtype.itemsize, capability, sms, vec > 1, strided)
    options = {
        "N": N, "stride_dym": stride_dym, "stride_dyn": stride_dyn, "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_dxm": N,
        "HAS_WEIGHT": w_dtype is not None, "NEED_DX": need_dx, "NEED_DW": need_dw, "VEC": vec, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "NUM_STAGES": config.num_stages, "num_warps": config.num_warps,
    }  # fmt: skip
    if config.chunked:
        return columns_plan(config, options, device, sms, centred=False)
    most = kernels.rms_norm_bwd_programs(MANY_ROWS, config, sms)
    return Planned(device, kernels.rms_norm_bwd_kernel, options, block=config.block_m, most=most)
