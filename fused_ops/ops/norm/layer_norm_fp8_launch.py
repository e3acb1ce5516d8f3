"""The launches of the kernels of layer norm quantised to fp8."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._runtime.backend import NO_FP64
from ..._runtime.device import FP8, KERNEL_DTYPES, device_properties, interpreting
from ..._runtime.launch import launch
from ..._runtime.notices import warn_once
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
    N = x.shape[-1]
    kernels, whole_vectors = _kernels()
    capability, sms = device_properties(x)
    config = kernels.layer_norm_fp8_config(M, N, x.element_size(), sms)
    options = {
        "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_qm": N, "eps": eps,
        "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "CVT": capability >= CVT_CAPABILITY and not interpreting(),  # the interpreter's own conversion is wrong
        "VEC": whole_vectors(N, x.element_size(), stride_xn, (stride_xm, N)), "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
    }  # fmt: skip
    tensors = (rows, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), q, scale)
    if config.chunked:
        launch(kernels.layer_norm_fp8_chunked_kernel, M, x, *tensors, N, **options)
    else:
        grid = -(-M // config.block_m)
        launch(kernels.layer_norm_fp8_kernel, grid, x, *tensors, M, N, **options, BLOCK_M=config.block_m)
    return q.view(FP8), scale
