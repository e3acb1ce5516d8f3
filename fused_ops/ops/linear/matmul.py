"""The launches of the matmul kernels on operands (M, K) and (N, K) of any strides."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._runtime.compiled import Planned
from ..._runtime.device import properties_of
from ..._runtime.launch import launch, launch_grid
from ..._runtime.plans import plan
from ..._runtime.rows import column_sum
from .linear_plan import Linear, linear_plan
from .matmul_plan import Key, Operands, forced, kernels, operands, reduce_plan

if TYPE_CHECKING:
    from ...kernels.config import MatmulConfig


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, pre: Tensor, activation: str, save_pre: bool,
    input_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """y = act((x @ weight^T) * input_scale * weight_scale + bias) by our kernels.

    x (M, K), weight (N, K) of any strides; y, pre (M, N) contiguous, pre written where save_pre; scales fp32, 1-D,
    of one element or M and N, both or neither.
    """
    M = x.shape[0]
    if M == 0 or weight.shape[0] == 0:
        return
    scales = None
    if input_scale is not None and weight_scale is not None:
        scales = scale_stride(input_scale), scale_stride(weight_scale)
    stride_b, b_dtype = (None, None) if bias is None else (bias.stride(0), bias.dtype)
    found = linear_plan(operands(x, M, x.stride(), weight), stride_b, b_dtype, y.dtype, activation, save_pre, scales, True)
    run_linear(found, M, x, weight, bias, y, pre, input_scale, weight_scale)


def scale_stride(scale: Tensor) -> int:
    """The stride between the scales of two rows; 0 where one scale is for all."""
    return scale.stride(0) if scale.numel() > 1 else 0


def run_linear(
    found: Linear, M: int, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, pre: Tensor,
    input_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch what linear_plan found, on M > 0 rows of x, whose strides are those that it was found for."""
    assert found.main is not None
    b = x if bias is None else bias
    xs, ws = x if input_scale is None else input_scale, x if weight_scale is None else weight_scale
    if found.reduce is None:
        launch(found.main, M, x, weight, b, y, pre, xs, ws)
        return
    part = torch.empty((found.splits, M, weight.shape[0]), dtype=torch.float32, device=x.device)
    launch(found.main, M, x, weight, part)
    add_up(found.reduce, M, part, b, y, pre, xs, ws)


def add_up(planned: Planned, M: int, *tensors: Tensor) -> None:
    """Launch a reduce_plan on M rows: (parts, bias, y, pre, scales of rows, scales of columns)."""
    options = planned.options
    launch_grid(planned, -(-M * options["N"] // options["BLOCK"]), (M,), *tensors)


@plan
def _epilogue_plan(
    N: int, dtype: torch.dtype, stride_b: int | None, b_dtype: torch.dtype | None, activation: str, save_pre: bool, device: int
) -> Planned:
    flags = {"ACT": activation, "HAS_BIAS": stride_b is not None, "SAVE_PRE": save_pre, "HAS_SCALE": False}
    strides = {"stride_b": stride_b or 0, "stride_xs": 0, "stride_ws": 0}
    return reduce_plan(N, 1, dtype, b_dtype, dtype, device, **strides, **flags)


def matmul_epilogue(product: Tensor, bias: Tensor | None, y: Tensor, activation: str) -> None:
    """y = act(product + bias), and product += bias in place: what follows a product computed by cuBLAS.

    product and y (..., N), fp32, contiguous.
    """
    stride_b, b_dtype = (None, None) if bias is None else (bias.stride(0), bias.dtype)
    N = y.shape[-1]
    planned = _epilogue_plan(N, y.dtype, stride_b, b_dtype, activation, y is not product, y.get_device())
    add_up(planned, y.numel() // N, product, product if bias is None else bias, y, product, product, product)


def activated(pre: Tensor, activation: str) -> Tensor:
    """act(pre) for pre (..., N) contiguous, in one kernel that computes in fp32."""
    h = torch.empty_like(pre)
    N = pre.shape[-1]
    planned = _epilogue_plan(N, pre.dtype, None, None, activation, False, pre.get_device())
    add_up(planned, pre.numel() // N, pre, pre, h, pre, pre, pre)
    return h


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b: by cuBLAS on a GPU, where nothing is fused; by our kernel when interpreted or forced."""
    if a.is_cuda and forced() is None:
        torch.mm(a, b, out=out)
    else:
        matmul(a, b.t(), None, out, out, "none", False)


def matmul_dact(dy: Tensor, w: Tensor, saved: Tensor, dpre: Tensor, activation: str, need_db: bool) -> Tensor:
    """dpre = (dy @ w) * act'(saved); returns db's partial sums (P, N) fp32, or dpre.

    dy (M, K), w (K, N) any strides; saved, dpre (M, N) contiguous.
    """
    M = dy.shape[0]
    planned = _dact_plan(operands(dy, M, dy.stride(), w.t(), read=saved), saved.dtype, activation, need_db)
    parts = dpre
    if need_db:
        parts = torch.empty((-(-M // planned.block), w.shape[1]), dtype=torch.float32, device=dy.device)
    launch(planned, M, dy, w, saved, dpre, parts)
    return parts


@plan
def _dact_plan(key: Key, saved_dtype: torch.dtype, activation: str, need_db: bool) -> Planned:
    o = Operands(*key)
    return _dact_launch(o.of_any_rows(), o.config("dact"), saved_dtype, activation, need_db)


@plan
def _dact_launch(o: Operands, config: MatmulConfig, saved_dtype: torch.dtype, activation: str, need_db: bool) -> Planned:
    options = {"ACT": activation, "NEED_DB": need_db, **o.options(config)}
    (stride_wn, stride_wk), (stride_xm, stride_xk) = o.weights[0], o.x
    again = functools.partial(_dact_launch, o, config, saved_dtype, activation, need_db)
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_w) = o.layouts()
        options |= {"stride_x": stride_x, "stride_w": stride_w, "X_T": x_t, "W_T": w_t}
        return o.planned(kernels().tma.linear_dact_tma_kernel, config, options, again)
    options |= {"stride_xm": stride_xm, "stride_xk": stride_xk, "stride_wn": stride_wn, "stride_wk": stride_wk}
    return o.planned(kernels().bwd.linear_dact_kernel, config, options, again)


def act_bwd(
    dy: Tensor, saved: Tensor, activation: str, need_dpre: bool, need_db: bool, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """(dpre, db): dpre = dy * act'(saved) (M, N), db (N,) its column sums. dy of any strides.

    dpre is dy itself where there is no activation. With in_place it is written over dy, which must be contiguous: each
    element is read once, by the thread that then writes it.
    """
    M, N = dy.shape
    write = need_dpre and activation != "none"
    dpre = torch.empty((M, N), dtype=dy.dtype, device=dy.device) if write and not in_place else dy
    if not (write or need_db):
        return dpre, dy.new_empty((0,))
    device = dy.get_device()
    planned = _act_bwd_plan(N, *dy.stride(), dy.dtype, saved.dtype, activation, write, need_db, device)
    rows = kernels().bwd.linear_act_bwd_rows(M, N, properties_of(device)[1])
    partial_rows = -(-M // rows)
    parts = torch.empty((partial_rows, N), dtype=torch.float32, device=dy.device) if need_db else dpre
    launch_grid(planned, partial_rows * planned.across, (M, N, rows), dy, saved.contiguous(), dpre, parts)
    return dpre, column_sum(parts, dy.dtype) if need_db else dy.new_empty((0,))


@plan
def _act_bwd_plan(
    N: int, stride_dym: int, stride_dyn: int, dtype: torch.dtype, saved_dtype: torch.dtype, activation: str, need_dpre: bool,
    need_db: bool, device: int,
) -> Planned:  # fmt: skip
    bwd = kernels().bwd
    options: dict[str, Any] = {
        "stride_dym": stride_dym, "stride_dyn": stride_dyn, "stride_sm": N, "stride_dpm": N,
        "ACT": activation, "NEED_DPRE": need_dpre, "NEED_DB": need_db,
        "BLOCK_M": bwd.ACT_BWD_BLOCK_M, "BLOCK_N": bwd.ACT_BWD_BLOCK_N, "num_warps": bwd.ACT_BWD_WARPS,
    }  # fmt: skip
    return Planned(device, bwd.linear_act_bwd_kernel, options, across=-(-N // bwd.ACT_BWD_BLOCK_N))
