"""The launches of the matmul kernels on operands (M, K) and (N, K) of any strides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._runtime.device import FP8, device_properties
from ..._runtime.launch import launch
from ..._runtime.notices import warn_once
from ..._runtime.rows import column_sum
from ..._runtime.scratch import ensure_allocator
from .matmul_plan import FP8_CHUNK, common, config_of, forced, kernels, tiles, tma_layout

if TYPE_CHECKING:
    from ...kernels.config import MatmulConfig

_no_warp_specialization: set[Any] = set()


def launch_tma(kernel: Any, x: Tensor, M: int, N: int, config: MatmulConfig, *args: Any, **kwargs: Any) -> None:
    """Launch a persistent kernel over TMA descriptors.

    A warp-specialised configuration that does not compile runs without warp specialisation from then on, with a warning
    once.
    """
    ensure_allocator()
    grid = min(device_properties(x)[1], tiles(M, N, config))
    if config.warp_specialize and (kernel, config) not in _no_warp_specialization:
        try:
            launch(kernel, grid, x, *args, **kwargs, WARP_SPECIALIZE=True)
        except Exception as error:  # the compiler's passes raise RuntimeError and more
            _no_warp_specialization.add((kernel, config))
            _say_dropped(kernel, config, error)
        else:
            return
    launch(kernel, grid, x, *args, **kwargs, WARP_SPECIALIZE=False)


def _say_dropped(kernel: Any, config: MatmulConfig, error: Exception) -> None:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} num_warps={config.num_warps} num_stages={config.num_stages}"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    reason = f"{tile} runs without warp specialisation, with which it does not compile: {type(error).__name__}: {first}"
    warn_once(kernel.fn.__name__, reason)


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, pre: Tensor, activation: str, save_pre: bool,
    input_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """y = act((x @ weight^T) * input_scale * weight_scale + bias) by our kernels.

    x (M, K), weight (N, K) of any strides; y, pre (M, N) contiguous, pre written where save_pre; scales fp32, 1-D,
    of one element or M and N, both or neither.
    """
    (M, K), N = x.shape, weight.shape[0]
    if M == 0 or N == 0:
        return
    config = config_of(x, (weight,), "fp8" if x.dtype is FP8 else "fwd")
    b, xs, ws = (x if t is None else t for t in (bias, input_scale, weight_scale))
    strides = {
        "stride_b": 0 if bias is None else bias.stride(0),
        "stride_xs": input_scale.stride(0) if input_scale is not None and input_scale.numel() > 1 else 0,
        "stride_ws": weight_scale.stride(0) if weight_scale is not None and weight_scale.numel() > 1 else 0,
    }
    imprecise = min(FP8_CHUNK, config.block_k) if x.dtype is FP8 and device_properties(x)[0][0] == 9 else 0
    options: dict[str, Any] = {"IMPRECISE": imprecise, **common(x, config, config.kind != "split_k")}
    epilogue = {"ACT": activation, "HAS_BIAS": bias is not None, "SAVE_PRE": save_pre, "HAS_SCALE": input_scale is not None}
    xw = {"stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_wn": weight.stride(0), "stride_wk": weight.stride(1)}
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_w) = tma_layout(x), tma_layout(weight)  # type: ignore[misc]
        launch_tma(
            kernels().tma.linear_fwd_tma_kernel, x, M, N, config, x, weight, b, y, pre, xs, ws, M, N, K,
            stride_x=stride_x, stride_w=stride_w, stride_y=N, **strides, **epilogue, **options,
            X_T=x_t, W_T=w_t, SUBTILES=config.subtiles,
        )  # fmt: skip
    elif config.kind == "split_k" and K > 0:
        per_split = -(-K // (config.splits * config.block_k)) * config.block_k
        splits = -(-K // per_split)
        part = torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
        kernel, grid = kernels().split_k.linear_split_k_kernel, splits * tiles(M, N, config)
        launch(kernel, grid, x, x, weight, part, M, N, K, per_split, **xw, **options)
        _reduce(part, splits, b, y, pre, xs, ws, strides, epilogue)
    else:
        options["GROUP_M"] = config.group_m
        kernel = kernels().fwd.linear_fwd_kernel
        sizes = (M, N, K)
        launch(
            kernel, tiles(M, N, config), x, x, weight, b, y, pre, xs, ws, *sizes,
            **xw, stride_ym=N, **strides, **epilogue, **options,
        )  # fmt: skip


def _reduce(
    part: Tensor, splits: int, b: Tensor, y: Tensor, pre: Tensor, xs: Tensor, ws: Tensor,
    strides: dict[str, int], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    """y and pre from the partial products: part (splits, M, N)."""
    M, N = y.numel() // y.shape[-1], y.shape[-1]
    block = kernels().split_k.reduce_block(part.element_size())
    launch(
        kernels().split_k.linear_reduce_kernel, -(-M * N // block), part, part, b, y, pre, xs, ws, M, N, splits,
        **strides, **epilogue, BLOCK=block, num_warps=4,
    )  # fmt: skip


def matmul_epilogue(product: Tensor, bias: Tensor | None, y: Tensor, activation: str) -> None:
    """y = act(product + bias), and product += bias in place: what follows a product computed by cuBLAS.

    product and y (M, N), fp32.
    """
    epilogue = {"ACT": activation, "HAS_BIAS": bias is not None, "SAVE_PRE": y is not product, "HAS_SCALE": False}
    strides = {"stride_b": 0 if bias is None else bias.stride(0), "stride_xs": 0, "stride_ws": 0}
    _reduce(product, 1, product if bias is None else bias, y, product, product, product, strides, epilogue)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b: by cuBLAS on a GPU, where nothing is fused; by our kernel when interpreted or forced."""
    if a.is_cuda and forced() is None:
        torch.mm(a, b, out=out)
    else:
        matmul(a, b.t(), None, out, out, "none", False)


def activated(pre: Tensor, activation: str) -> Tensor:
    """act(pre) for pre (M, N) contiguous, in one kernel that computes in fp32."""
    h = torch.empty_like(pre)
    epilogue = {"ACT": activation, "HAS_BIAS": False, "SAVE_PRE": False, "HAS_SCALE": False}
    _reduce(pre, 1, pre, h, pre, pre, pre, {"stride_b": 0, "stride_xs": 0, "stride_ws": 0}, epilogue)
    return h


def matmul_dact(dy: Tensor, w: Tensor, saved: Tensor, dpre: Tensor, activation: str, need_db: bool) -> Tensor:
    """dpre = (dy @ w) * act'(saved); returns db's partial sums (P, N) fp32, or dpre.

    dy (M, K), w (K, N) any strides; saved, dpre (M, N) contiguous.
    """
    (M, K), N = dy.shape, w.shape[1]
    config = config_of(dy, (w.t(),), "dact", saved)
    parts = torch.empty((-(-M // config.block_m), N), dtype=torch.float32, device=dy.device) if need_db else dpre
    flags = {"ACT": activation, "NEED_DB": need_db}
    tensors = (dy, w, saved, dpre, parts)
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_w) = tma_layout(dy), tma_layout(w.t())  # type: ignore[misc]
        launch_tma(
            kernels().tma.linear_dact_tma_kernel, dy, M, N, config, *tensors, M, N, K, stride_x=stride_x, stride_w=stride_w,
            X_T=x_t, W_T=w_t, SUBTILES=config.subtiles, **flags, **common(dy, config),
        )  # fmt: skip
    else:
        launch(
            kernels().bwd.linear_dact_kernel, tiles(M, N, config), dy, *tensors, M, N, K,
            stride_xm=dy.stride(0), stride_xk=dy.stride(1), stride_wn=w.stride(1), stride_wk=w.stride(0),
            **flags, **common(dy, config),
        )  # fmt: skip
    return parts


def act_bwd(
    dy: Tensor, saved: Tensor, activation: str, need_dpre: bool, need_db: bool, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """(dpre, db): dpre = dy * act'(saved) (M, N), db (N,) its column sums. dy of any strides.

    dpre is dy itself where there is no activation. With in_place it is written over dy, which must be contiguous: each
    element is read once, by the thread that then writes it.
    """
    bwd = kernels().bwd
    M, N = dy.shape
    rows = bwd.linear_act_bwd_rows(M, N, device_properties(dy)[1])
    write = need_dpre and activation != "none"
    dpre = torch.empty((M, N), dtype=dy.dtype, device=dy.device) if write and not in_place else dy
    parts = torch.empty((-(-M // rows), N), dtype=torch.float32, device=dy.device) if need_db else dpre
    if write or need_db:
        launch(
            bwd.linear_act_bwd_kernel, -(-M // rows) * -(-N // bwd.ACT_BWD_BLOCK_N), dy,
            dy, saved.contiguous(), dpre, parts, M, N, rows,
            stride_dym=dy.stride(0), stride_dyn=dy.stride(1), stride_sm=N, stride_dpm=N,
            ACT=activation, NEED_DPRE=write, NEED_DB=need_db,
            BLOCK_M=bwd.ACT_BWD_BLOCK_M, BLOCK_N=bwd.ACT_BWD_BLOCK_N, num_warps=bwd.ACT_BWD_WARPS,
        )  # fmt: skip
    return dpre, column_sum(parts, dy.dtype) if need_db else dy.new_empty((0,))
