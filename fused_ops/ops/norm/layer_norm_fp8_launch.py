"""The launches of the kernels of layer norm quantised to fp8."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.compiled import Planned
from ..._runtime.device import FP8, KERNEL_DTYPES, interpreting, properties_of
from ..._runtime.launch import launch
from ..._runtime.notices import warn_once
from ..._runtime.plans import plan
from ..._runtime.rows import rows_and_strides
from .layer_norm_fp8_reference import layer_norm_fp8_reference

CVT_CAPABILITY = (8, 9)  # Ada: the first with an instruction that converts to e4m3


@functools.cache
def _kernels() -> Any:
    from ...kernels import rows
    from ...kernels.norm import layer_norm_fp8

    return layer_norm_fp8, rows.whole_vectors


def layer_norm_fp8_launch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """layer_norm_fp8_reference by one Triton kernel."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        if x.numel():
            warn_once("layer_norm_fp8", NO_FP64)
        return layer_norm_fp8_reference(x, weight, bias, eps)
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    w_dtype, b_dtype = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    planned = _plan(
        (M - 1).bit_length(), x.shape[-1], stride_xm, stride_xn, float(eps), x.dtype, w_dtype, b_dtype, x.get_device()
    )
    weight, bias = x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous()
    launch(planned, M, rows, weight, bias, q, scale)
    return q.view(FP8), scale


@plan
def _plan(
    row_bits: int, N: int, stride_xm: int, stride_xn: int, eps: float,
    dtype: torch.dtype, w_dtype: torch.dtype | None, b_dtype: torch.dtype | None, device: int,
) -> Planned:  # fmt: skip
    """The launch over up to 2 ** row_bits rows. w_dtype, b_dtype: None without a weight, a bias."""
    M = 1 << row_bits
    kernels, whole_vectors = _kernels()
    capability, sms = properties_of(device)
    config = kernels.layer_norm_fp8_config(M, N, dtype.itemsize, sms)
    options = {
        "N": N, "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_qm": N, "eps": eps,
        "HAS_WEIGHT": w_dtype is not None, "HAS_BIAS": b_dtype is not None,
        "CVT": capability >= CVT_CAPABILITY and not interpreting(),  # the interpreter's own conversion is wrong
        "VEC": whole_vectors(N, dtype.itemsize, stride_xn, (stride_xm, N)), "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
    }  # fmt: skip
    if config.chunked:
        return Planned(device, kernels.layer_norm_fp8_chunked_kernel, options, takes_rows=False)
    options["BLOCK_M"] = config.block_m
    return Planned(device, kernels.layer_norm_fp8_kernel, options, block=config.block_m)
