"""Which kernel computes a linear, and with which launches: `linear_plan` says, and why."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..._runtime.compiled import Planned
from ..._runtime.device import FP8, properties_of
from ..._runtime.plans import plan
from .dispatch import rule
from .matmul_plan import FP8_CHUNK, Key, Operands, forced, kernels, reduce_plan

if TYPE_CHECKING:
    from ...kernels.config import MatmulConfig


class Linear(NamedTuple):
    """What computes a linear: backend "triton", or one of dispatch.Rule, why, and for the former the configuration and launches.

    splits, reduce: of K in parts, how many there are and the launch that adds them. reduce alone: what follows a library's product.
    """

    backend: str
    reason: str
    config: MatmulConfig | None = None
    main: Planned | None = None
    splits: int = 0
    reduce: Planned | None = None


@plan
def linear_plan(
    key: Key, stride_b: int | None, b_dtype: torch.dtype | None, out_dtype: torch.dtype, activation: str, save_pre: bool,
    scales: tuple[int, int] | None = None, ours: bool = False,
) -> Linear:  # fmt: skip
    """The plan for act((x @ weight^T) * scales + bias), y in out_dtype.

    key: `operands` of x and weight. stride_b, b_dtype: None without a bias. scales: strides of the scales of x's and of
    weight's rows. ours: whether a kernel of ours is asked for where cuBLAS would be faster.
    """
    o = Operands(*key)
    if o.cuda and forced() is None and not ours:
        found = _by_library(o, stride_b, b_dtype, out_dtype, activation, save_pre, scales)
        if found is not None:
            return found
    config = o.config("fp8" if o.dtype is FP8 else "fwd")
    return _linear_launches(o.of_any_rows(), config, stride_b, b_dtype, out_dtype, activation, save_pre, scales)


def _by_library(
    o: Operands, stride_b: int | None, b_dtype: torch.dtype | None, out_dtype: torch.dtype, activation: str, save_pre: bool,
    scales: tuple[int, int] | None,
) -> Linear | None:  # fmt: skip
    """linear_plan's answer where the table of dispatch.py has a rule that these operands satisfy."""
    use = "fp8" if o.dtype is FP8 else "train" if save_pre else "fwd"
    aligned = o.N % 16 == 0 and o.K % 16 == 0 and o.access() == "tma"
    found = rule(use, activation, o.dtype, o.rows, aligned, properties_of(o.device)[0][0])
    if found is None or (found.backend == "cublaslt" and (stride_b != 1 or b_dtype is not o.dtype)):
        return None
    if found.backend != "scaled_mm" or scales is None:
        return Linear(found.backend, found.reason)
    rounds_once = activation == "none" and out_dtype is torch.bfloat16 and b_dtype in (None, torch.bfloat16)
    if rounds_once and stride_b in (None, 1) and (scales[0] > 0) == (scales[1] > 0):
        return Linear(found.backend, found.reason)
    flags = {"ACT": activation, "HAS_BIAS": stride_b is not None, "SAVE_PRE": False, "HAS_SCALE": True}
    strides = {"stride_b": stride_b or 0, "stride_xs": scales[0], "stride_ws": scales[1]}
    after = reduce_plan(o.N, 1, torch.float32, b_dtype, out_dtype, o.device, **flags, **strides)
    return Linear(found.backend, found.reason, reduce=after)


@plan
def _linear_launches(
    o: Operands, config: MatmulConfig, stride_b: int | None, b_dtype: torch.dtype | None, out_dtype: torch.dtype, activation: str,
    save_pre: bool, scales: tuple[int, int] | None,
) -> Linear:  # fmt: skip
    """linear_plan's launches, the same ones for every number of rows that has this configuration."""
    again = functools.partial(_linear_launches, o, config, stride_b, b_dtype, out_dtype, activation, save_pre, scales)
    imprecise = min(FP8_CHUNK, config.block_k) if o.dtype is FP8 and properties_of(o.device)[0][0] == 9 else 0
    epilogue = {"ACT": activation, "HAS_BIAS": stride_b is not None, "SAVE_PRE": save_pre, "HAS_SCALE": scales is not None}
    stride_xs, stride_ws = scales or (0, 0)
    epilogue |= {"stride_b": stride_b or 0, "stride_xs": stride_xs, "stride_ws": stride_ws}
    options = {"IMPRECISE": imprecise, **o.options(config, config.kind != "split_k")}
    (stride_wn, stride_wk), (stride_xm, stride_xk) = o.weights[0], o.x
    reason = "bias and activation in the matmul's epilogue"
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_w) = o.layouts()
        options |= {"stride_x": stride_x, "stride_w": stride_w, "stride_y": o.N, "X_T": x_t, "W_T": w_t, **epilogue}
        return Linear("triton", reason, config, o.planned(kernels().tma.linear_fwd_tma_kernel, config, options, again))
    options |= {"stride_xm": stride_xm, "stride_xk": stride_xk, "stride_wn": stride_wn, "stride_wk": stride_wk}
    if config.kind == "split_k" and o.K > 0:
        options["k_per_split"] = -(-o.K // (config.splits * config.block_k)) * config.block_k
        splits = -(-o.K // options["k_per_split"])
        main = o.planned(kernels().split_k.linear_split_k_kernel, config, options, again, across=splits)
        reduce = reduce_plan(o.N, splits, torch.float32, b_dtype, out_dtype, o.device, **epilogue)
        return Linear("triton", reason, config, main, splits, reduce)
    options |= {"GROUP_M": config.group_m, "stride_ym": o.N, **epilogue}
    return Linear("triton", reason, config, o.planned(kernels().fwd.linear_fwd_kernel, config, options, again))
