"""The backward of both norms over rows that take several blocks: the launches of kernels/norm/norm_bwd_wide.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._runtime.compiled import Planned
from ..._runtime.launch import launch
from ..._runtime.plans import MANY_ROWS, plan


@functools.cache
def _kernels() -> Any:
    from ...kernels.norm import norm_bwd_wide

    return norm_bwd_wide


def columns_plan(config: Any, options: dict[str, Any], device: int, sms: int, centred: bool) -> Planned:
    """The launch of the second kernel, with config and the options that it shares with the kernel of one pass."""
    kernels, N = _kernels(), options["N"]
    groups, strips = kernels.row_groups(MANY_ROWS, N, config, sms), -(-N // config.block_n)
    options = {**options, "CENTRED": centred, "NEED_DB": options.get("NEED_DB", False)}
    return Planned(
        device, kernels.norm_bwd_chunked_columns_kernel, options, block=config.block_m, across=strips, most=groups * strips
    )


def launch_columns(
    planned: Planned, M: int, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor, dw_part: Tensor, db_part: Tensor
) -> None:  # fmt: skip
    """Launch planned, of `columns_plan`, over M rows; before it, where dx is needed, the kernel that sums over columns."""
    options = planned.options
    sums = rstd
    if options["NEED_DX"]:
        sums = x.new_empty((M, 2), dtype=torch.float32)
        strides = tuple(options[f"stride_{name}"] for name in ("dym", "dyn", "xm", "xn"))
        first = _sums_plan(
            options["N"], strides, options["BLOCK_N"], options["VEC"], options["HAS_WEIGHT"], options["CENTRED"], options["num_warps"],
            dy.dtype, x.dtype, weight.dtype, planned.device,
        )  # fmt: skip
        launch(first, M, dy, x, weight, mean, rstd, sums)
    launch(planned, M, dy, x, weight, mean, rstd, sums, dx, dw_part, db_part)


@plan
def _sums_plan(
    N: int, strides: tuple[int, int, int, int], block_n: int, vec: int, has_weight: bool, centred: bool, num_warps: int,
    dy_dtype: torch.dtype, dtype: torch.dtype, w_dtype: torch.dtype, device: int,
) -> Planned:  # fmt: skip
    """The launch of the first kernel, whose chunks are as wide as the strips of the second."""
    options = {
        "N": N, **dict(zip(("stride_dym", "stride_dyn", "stride_xm", "stride_xn"), strides)), "HAS_WEIGHT": has_weight,
        "CENTRED": centred, "VEC": vec, "BLOCK_N": block_n, "NUM_STAGES": 1, "num_warps": num_warps,
    }  # fmt: skip
    return Planned(device, _kernels().norm_bwd_chunked_sums_kernel, options, takes_rows=False)
