"""The launches of the gated linear's kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..._runtime.device import device_properties
from ..._runtime.launch import launch
from ..._runtime.rows import column_sum
from .matmul import launch_tma
from .matmul_plan import common, config_of, fp32_on_cublas, kernels, tiles, tma_layout


def matmul_gated(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None,
    y: Tensor, g: Tensor, u: Tensor, activation: str, save_pre: bool,
) -> None:  # fmt: skip
    """y = act(g) * u with g = x @ gate_weight^T + gate_bias and u = x @ up_weight^T + up_bias.

    y, g, u (M, N) contiguous; g and u are written where save_pre.
    """
    (M, K), N = x.shape, gate_weight.shape[0]
    if M == 0 or N == 0:
        return
    config = config_of(x, (gate_weight, up_weight), "gated")
    tensors = (x, gate_weight, up_weight, x if gate_bias is None else gate_bias, x if up_bias is None else up_bias, y, g, u)
    options: dict[str, Any] = {
        "stride_bg": 0 if gate_bias is None else gate_bias.stride(0), "stride_bu": 0 if up_bias is None else up_bias.stride(0),
        "ACT": activation, "HAS_BG": gate_bias is not None, "HAS_BU": up_bias is not None, "SAVE_PRE": save_pre,
        **common(x, config),
    }  # fmt: skip
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_g), (_, stride_u) = (tma_layout(t) for t in (x, gate_weight, up_weight))  # type: ignore[misc]
        launch_tma(
            kernels().gated.gated_linear_fwd_tma_kernel, x, M, N, config, *tensors, M, N, K,
            stride_x=stride_x, stride_g=stride_g, stride_u=stride_u, X_T=x_t, W_T=w_t, SUBTILES=config.subtiles, **options,
        )  # fmt: skip
    else:
        launch(
            kernels().gated.gated_linear_fwd_kernel, tiles(M, N, config), x, *tensors, M, N, K,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_gn=gate_weight.stride(0), stride_gk=gate_weight.stride(1),
            stride_un=up_weight.stride(0), stride_uk=up_weight.stride(1), stride_ym=N, **options,
        )  # fmt: skip


def gate_bwd(
    dy: Tensor, g: Tensor, u: Tensor, activation: str, need_dbg: bool, need_dbu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dg, du, dbg, dbu) of y = act(g) * u; dy (M, N) of any strides, dg, du (M, N), dbg, dbu (N,) or empty."""
    bwd = kernels().bwd
    M, N = dy.shape
    rows = bwd.linear_act_bwd_rows(M, N, device_properties(dy)[1])
    P = -(-M // rows)
    need_db = need_dbg or need_dbu
    dg = torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    du = torch.empty_like(dg)
    parts = torch.empty((2, P, N), dtype=torch.float32, device=dy.device) if need_db else dg
    launch(
        kernels().gated_bwd.gate_bwd_kernel, P * -(-N // bwd.ACT_BWD_BLOCK_N), dy,
        dy, g.contiguous(), u.contiguous(), dg, du, parts, M, N, P, rows,
        stride_dym=dy.stride(0), stride_dyn=dy.stride(1), ACT=activation, NEED_DB=need_db,
        BLOCK_M=bwd.ACT_BWD_BLOCK_M, BLOCK_N=bwd.ACT_BWD_BLOCK_N, num_warps=bwd.ACT_BWD_WARPS,
    )  # fmt: skip
    none = dy.new_empty((0,))
    return dg, du, column_sum(parts[0], dy.dtype) if need_dbg else none, column_sum(parts[1], dy.dtype) if need_dbu else none


def product_sum(a: Tensor, b: Tensor, c: Tensor, d: Tensor, out: Tensor) -> None:
    """out = a @ b + c @ d, rounded once. a, c (M, K) contiguous; b, d (K, N) any strides; out (M, N) contiguous."""
    if fp32_on_cublas(a):
        torch.mm(a, b, out=out).addmm_(c, d)
        return
    (M, K), N = a.shape, b.shape[1]
    config = config_of(a, (b.t(), d.t()), "fwd")
    if config.kind == "split_k":
        config = dataclasses.replace(config, kind="pointer", block_k=64)
    strides = {"stride_bk": b.stride(0), "stride_bn": b.stride(1), "stride_dk": d.stride(0), "stride_dn": d.stride(1)}
    if config.kind == "tma":
        (b_t, stride_b), (_, stride_d) = tma_layout(b), tma_layout(d)  # type: ignore[misc]
        launch_tma(
            kernels().gated_bwd.product_sum_tma_kernel, a, M, N, config, a, b, c, d, out, M, N, K,
            stride_b=stride_b, stride_d=stride_d, B_T=b_t, SUBTILES=config.subtiles, **common(a, config),
        )  # fmt: skip
    else:
        kernel, grid = kernels().gated_bwd.product_sum_kernel, tiles(M, N, config)
        launch(kernel, grid, a, a, b, c, d, out, M, N, K, **strides, **common(a, config))
