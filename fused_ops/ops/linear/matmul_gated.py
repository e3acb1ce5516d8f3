"""The launches of the gated linear's kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._runtime.compiled import Planned
from ..._runtime.device import properties_of
from ..._runtime.launch import launch, launch_grid
from ..._runtime.plans import plan
from ..._runtime.rows import column_sum, column_sums
from .matmul_plan import Key, Operands, fp32_on_cublas, kernels, operands

if TYPE_CHECKING:
    from ...kernels.config import MatmulConfig


def matmul_gated(
    x: Tensor, rows: tuple[int, int, int], gate_weight: Tensor, up_weight: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None,
    y: Tensor, g: Tensor, u: Tensor, activation: str, save_pre: bool,
) -> None:  # fmt: skip
    """y = act(g) * u with g = x @ gate_weight^T + gate_bias and u = x @ up_weight^T + up_bias.

    rows: (M, row stride, column stride) of x, of any strides; y, g, u (M, N) contiguous; g and u are written where save_pre.
    """
    M = rows[0]
    if y.numel() == 0:
        return
    strides = None if gate_bias is None else gate_bias.stride(0), None if up_bias is None else up_bias.stride(0)
    planned = _gated_plan(operands(x, M, rows[1:], gate_weight, up_weight), *strides, activation, save_pre)
    launch(
        planned, M, x, gate_weight, up_weight, x if gate_bias is None else gate_bias, x if up_bias is None else up_bias, y, g, u
    )


@plan
def _gated_plan(key: Key, stride_bg: int | None, stride_bu: int | None, activation: str, save_pre: bool) -> Planned:
    o = Operands(*key)
    return _gated_launch(o.of_any_rows(), o.config("gated"), stride_bg, stride_bu, activation, save_pre)


@plan
def _gated_launch(
    o: Operands, config: MatmulConfig, stride_bg: int | None, stride_bu: int | None, activation: str, save_pre: bool
) -> Planned:
    """The launch of the forward; stride_bg, stride_bu: None without a bias of the gate, of the other half."""
    options: dict[str, Any] = {
        "stride_bg": stride_bg or 0, "stride_bu": stride_bu or 0, "ACT": activation, "HAS_BG": stride_bg is not None,
        "HAS_BU": stride_bu is not None, "SAVE_PRE": save_pre, **o.options(config),
    }  # fmt: skip
    again = functools.partial(_gated_launch, o, config, stride_bg, stride_bu, activation, save_pre)
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_g), (_, stride_u) = o.layouts()
        options |= {"stride_x": stride_x, "stride_g": stride_g, "stride_u": stride_u, "X_T": x_t, "W_T": w_t}
        return o.planned(kernels().gated.gated_linear_fwd_tma_kernel, config, options, again)
    (stride_xm, stride_xk), ((stride_gn, stride_gk), (stride_un, stride_uk)) = o.x, o.weights
    options |= {"stride_xm": stride_xm, "stride_xk": stride_xk, "stride_gn": stride_gn, "stride_gk": stride_gk}
    options |= {"stride_un": stride_un, "stride_uk": stride_uk, "stride_ym": o.N}
    return o.planned(kernels().gated.gated_linear_fwd_kernel, config, options, again)


def gate_bwd(
    dy: Tensor, g: Tensor, u: Tensor, activation: str, need_dbg: bool, need_dbu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dg, du, dbg, dbu) of y = act(g) * u; dy (M, N) of any strides, dg, du (M, N), dbg, dbu (N,) or empty."""
    M, N = dy.shape
    device, need_db = dy.get_device(), need_dbg or need_dbu
    planned = _gate_bwd_plan(N, *dy.stride(), dy.dtype, activation, need_db, device)
    bwd = kernels().bwd
    rows = bwd.linear_act_bwd_rows(M, N, properties_of(device)[1], bwd.GATE_BWD_PROGRAMS)
    P = -(-M // rows)
    dg = torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    du = torch.empty_like(dg)
    parts = torch.empty((2, P, N), dtype=torch.float32, device=dy.device) if need_db else dg
    launch_grid(planned, P * planned.across, (M, N, P, rows), dy, g.contiguous(), u.contiguous(), dg, du, parts)
    if need_dbg and need_dbu:
        return dg, du, *column_sums(parts, dy.dtype, dy.dtype)
    none = dy.new_empty((0,))
    return dg, du, column_sum(parts[0], dy.dtype) if need_dbg else none, column_sum(parts[1], dy.dtype) if need_dbu else none


@plan
def _gate_bwd_plan(
    N: int, stride_dym: int, stride_dyn: int, dtype: torch.dtype, activation: str, need_db: bool, device: int
) -> Planned:
    bwd = kernels().bwd
    options: dict[str, Any] = {
        "stride_dym": stride_dym, "stride_dyn": stride_dyn, "ACT": activation, "NEED_DB": need_db,
        "BLOCK_M": bwd.ACT_BWD_BLOCK_M, "BLOCK_N": bwd.ACT_BWD_BLOCK_N, "num_warps": bwd.ACT_BWD_WARPS,
    }  # fmt: skip
    return Planned(device, kernels().gated_bwd.gate_bwd_kernel, options, across=-(-N // bwd.ACT_BWD_BLOCK_N))


def product_sum(a: Tensor, b: Tensor, c: Tensor, d: Tensor, out: Tensor) -> None:
    """out = a @ b + c @ d, rounded once. a, c (M, K) contiguous; b, d (K, N) any strides; out (M, N) contiguous."""
    if fp32_on_cublas(a):
        torch.mm(a, b, out=out).addmm_(c, d)
        return
    M = a.shape[0]
    launch(_product_sum_plan(operands(a, M, a.stride(), b.t(), d.t())), M, a, b, c, d, out)


@plan
def _product_sum_plan(key: Key) -> Planned:
    o = Operands(*key)
    return _product_sum_launch(o.of_any_rows(), o.config("sum"))


@plan
def _product_sum_launch(o: Operands, config: MatmulConfig) -> Planned:
    options = o.options(config)
    again = functools.partial(_product_sum_launch, o, config)
    if config.kind == "tma":
        _, (columns, stride_b), (_, stride_d) = o.layouts()  # of b^T and d^T, as weights are
        options |= {"stride_b": stride_b, "stride_d": stride_d, "B_T": not columns}
        return o.planned(kernels().gated_bwd.product_sum_tma_kernel, config, options, again)
    (stride_bn, stride_bk), (stride_dn, stride_dk) = o.weights
    options |= {"stride_bk": stride_bk, "stride_bn": stride_bn, "stride_dk": stride_dk, "stride_dn": stride_dn}
    return o.planned(kernels().gated_bwd.product_sum_kernel, config, options, again)
