"""The launches of a two-layer perceptron, forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._runtime.device import KERNEL_DTYPES
from ..._runtime.rows import column_sum, rows_of
from .linear_launch import linear_launch
from .matmul import act_bwd, activated, matmul_dact, product
from .matmul_plan import fp32_on_cublas
from .mlp_reference import mlp_bwd_reference


def mlp_launch(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_pre: bool,
    save_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """mlp_reference by two launches of fused_linear's kernels."""
    h, pre = linear_launch(x, weight1, bias1, activation, save_pre)
    y, _ = linear_launch(h, weight2, bias2, "none", False)
    return y, pre, h if save_h else x.new_empty((0,))


def infer_launch(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> Tensor:
    return mlp_launch(x, weight1, bias1, weight2, bias2, activation, False, False)[0]


def mlp_bwd_launch(
    dy: Tensor, weight2: Tensor, saved: Tensor, h: Tensor | None, activation: str,
    need_dpre: bool, need_db1: bool, need_dw2: bool, need_db2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """mlp_bwd_reference by kernels; dpre and the partial sums of db1 come from the epilogue of dy @ weight2.

    The order of the steps bounds memory: partial sums are freed before dw2 is allocated, and a hidden layer that is
    computed again is freed before dpre is allocated.
    """
    (N, H), M = weight2.shape, math.prod(dy.shape[:-1])
    if dy.dtype not in KERNEL_DTYPES or 0 in (M, N, H):
        return mlp_bwd_reference(dy, weight2, saved, h, activation, need_dpre, need_db1, need_dw2, need_db2)
    rows, none = rows_of(dy), dy.new_empty((0,))
    dpre = db1 = dw2 = db2 = none

    def weight_gradient(hidden: Tensor) -> Tensor:
        out = torch.empty((N, H), dtype=dy.dtype, device=dy.device)
        product(rows.t(), hidden.reshape(M, H), out)
        return out

    if need_db2:
        _, db2 = act_bwd(rows, rows, "none", False, True)
    if need_dw2 and h is None:
        dw2 = weight_gradient(activated(saved.contiguous(), activation))
    if need_dpre or need_db1:
        dpre = torch.empty((*dy.shape[:-1], H), dtype=dy.dtype, device=dy.device)
        db1 = _through_activation(rows, weight2, saved, dpre.view(M, H), activation, need_db1)
        dpre = dpre if need_dpre else none
    if need_dw2 and h is not None:
        dw2 = weight_gradient(h)
    return dpre, db1, dw2, db2


def _through_activation(rows: Tensor, weight2: Tensor, saved: Tensor, dpre: Tensor, activation: str, need_db1: bool) -> Tensor:
    """Write dpre = (rows @ weight2) * act'(saved), and return db1, or an empty tensor. fp32 on a GPU: cuBLAS first."""
    if fp32_on_cublas(rows):
        product(rows, weight2, dpre)
        return act_bwd(dpre, saved, activation, True, need_db1, in_place=True)[1]
    parts = matmul_dact(rows, weight2, saved.contiguous(), dpre, activation, need_db1)
    return column_sum(parts, rows.dtype) if need_db1 else rows.new_empty((0,))
