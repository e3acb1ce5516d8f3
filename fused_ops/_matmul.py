"""From tensors to a matmul kernel: which one runs (`linear_plan` says, and why), and its launch.

Every product here is x @ w^T with x (M, K) and w (N, K) of any strides. No operand is ever copied: what TMA cannot
describe, the pointer kernels read. (Leading dimensions of an input that do not collapse into one M are the one copy,
made before, by `rows_of`.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._launch import column_sum, device_facts, interpreting, launch
from ._scratch import ensure_allocator

if TYPE_CHECKING:
    from .kernels.config import MatmulConfig

FP8 = torch.float8_e4m3fn
FP8_CHUNK = 128  # products that Hopper's fp8 tensor cores may sum in their own, narrower, accumulator

_forced: MatmulConfig | None = None
_no_warp_specialization: set[Any] = set()


@functools.cache
def kernels() -> Any:
    """The kernel modules, imported when first needed."""
    from .kernels import config, linear, linear_bwd, linear_config, linear_gated, linear_gated_bwd, linear_splitk, linear_tma

    return SimpleNamespace(
        config=config, fwd=linear, bwd=linear_bwd, choose=linear_config.linear_config, gated=linear_gated,
        gated_bwd=linear_gated_bwd, split_k=linear_splitk, tma=linear_tma,
    )  # fmt: skip


@contextlib.contextmanager
def forced_config(config: MatmulConfig) -> Iterator[None]:
    """While active, matmuls that can run with this configuration do: for tuning and tests. Process-wide, not for threads."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


class Plan(NamedTuple):
    """What computes a linear: backend "triton" or "cublas", why, and the kernel's configuration for the former."""

    backend: str
    reason: str
    config: MatmulConfig | None


def linear_plan(x: Tensor, weight: Tensor, activation: str = "none", save_pre: bool = False) -> Plan:
    """The plan for act(x @ weight^T + bias) with x (M, K), weight (N, K), on x's device."""
    if x.is_cuda and _forced is None:
        if x.dtype is torch.float32:
            return Plan(
                "cublas", "fp32 products: cuBLAS, in torch's TF32 setting, then bias and activation in one kernel", None
            )
        if activation == "none" and not save_pre:
            return Plan("cublas", "no activation: cuBLAS adds the bias itself, nothing is left to fuse", None)
    use = "fp8" if x.dtype is FP8 else "fwd"
    return Plan("triton", "bias and activation in the matmul's epilogue", _config(x, (weight,), use))


def _config(x: Tensor, weights: tuple[Tensor, ...], use: str, tile: Tensor | None = None) -> MatmulConfig:
    """The configuration of x (M, K) times weights (N, K), by size, alignment and device; tile: what the epilogue reads."""
    (M, K), N = x.shape, weights[0].shape[0]
    access = _access(x, weights, N) if tile is None or tile.data_ptr() % 16 == 0 else "any"
    if (
        _forced is not None
        and (_forced.kind != "tma" or access == "tma")
        and (_forced.kind != "split_k" or use in ("fwd", "fp8"))
    ):
        return _forced
    return kernels().choose(M, N, K, x.element_size(), *device_facts(x), access, use)


def _access(x: Tensor, weights: tuple[Tensor, ...], N: int) -> str:
    """How the operands can be read: "tma", "aligned" (128-bit loads), or "any"."""
    operands = (x, *weights)
    if any(t.data_ptr() % 16 or _tma_layout(t) is None for t in operands):
        return "any"
    if x.dtype is torch.float32 or N * max(x.element_size(), 2) % 16 or x.shape[1] == 0:
        return "aligned"
    layouts = [_tma_layout(t) for t in operands]
    same = len({layout[0] for layout in layouts[1:] if layout}) == 1
    k_major = all(layout and not layout[0] for layout in layouts)
    return "tma" if same and (x.dtype is not FP8 or k_major) else "aligned"


def _tma_layout(t: Tensor) -> tuple[bool, int] | None:
    """(whether t is stored transposed, its row stride) where TMA's stride rules hold, else None."""
    for transposed in (False, True):
        rows, cols = (1, 0) if transposed else (0, 1)
        stride = t.stride(rows)
        if t.stride(cols) == 1 and stride * t.element_size() % 16 == 0 and stride >= t.shape[cols]:
            return transposed, stride
    return None


def precision_of(dtype: torch.dtype, cuda: bool) -> str:
    """How products are multiplied: "tf32" where torch's setting, old or new, says so for fp32 on a GPU; else "ieee"."""
    return "tf32" if cuda and dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _common(x: Tensor, config: MatmulConfig, group: bool = True) -> dict[str, Any]:
    """The keyword arguments that all matmul kernels take."""
    options = {
        "PRECISION": precision_of(x.dtype, x.is_cuda), "WIDEN": interpreting() and x.dtype in (torch.bfloat16, FP8),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    return options | {"GROUP_M": config.group_m} if group else options


def _tiles(M: int, N: int, config: MatmulConfig) -> int:
    return -(-M // config.block_m) * -(-N // config.block_n)


def launch_tma(kernel: Any, x: Tensor, M: int, N: int, config: MatmulConfig, *args: Any, **kwargs: Any) -> None:
    """Launch a persistent kernel over descriptors. A warp-specialised configuration that does not compile is dropped."""
    ensure_allocator()
    grid = min(device_facts(x)[1], _tiles(M, N, config))
    if config.warp_specialize and (kernel, config) not in _no_warp_specialization:
        try:
            launch(kernel, grid, x, *args, **kwargs, WARP_SPECIALIZE=True)
        except Exception:  # the compiler's passes raise RuntimeError and more
            _no_warp_specialization.add((kernel, config))
        else:
            return
    launch(kernel, grid, x, *args, **kwargs, WARP_SPECIALIZE=False)


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, pre: Tensor, activation: str, save_pre: bool,
    x_scale: Tensor | None = None, w_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """y = act((x @ weight^T) * x_scale * w_scale + bias) by our kernels.

    x (M, K), weight (N, K) of any strides; y, pre (M, N) contiguous, pre written where save_pre; scales fp32, of one
    element or (M,) and (N,), both or neither.
    """
    (M, K), N = x.shape, weight.shape[0]
    if M == 0 or N == 0:
        return
    config = _config(x, (weight,), "fp8" if x.dtype is FP8 else "fwd")
    b, xs, ws = (x if t is None else t for t in (bias, x_scale, w_scale))
    strides = {
        "stride_b": 0 if bias is None else bias.stride(0),
        "stride_xs": 1 if x_scale is not None and x_scale.numel() > 1 else 0,
        "stride_ws": 1 if w_scale is not None and w_scale.numel() > 1 else 0,
    }
    options: dict[str, Any] = {"IMPRECISE": FP8_CHUNK if x.dtype is FP8 else 0, **_common(x, config, config.kind != "split_k")}
    epilogue = {"ACT": activation, "HAS_BIAS": bias is not None, "SAVE_PRE": save_pre, "HAS_SCALE": x_scale is not None}
    xw = {"stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_wn": weight.stride(0), "stride_wk": weight.stride(1)}
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_w) = _tma_layout(x), _tma_layout(weight)  # type: ignore[misc]
        launch_tma(
            kernels().tma.linear_fwd_tma_kernel, x, M, N, config, x, weight, b, y, pre, xs, ws, M, N, K,
            stride_x=stride_x, stride_w=stride_w, stride_y=N, **strides, **epilogue, **options,
            X_T=x_t, W_T=w_t, SUBTILES=config.subtiles,
        )  # fmt: skip
    elif config.kind == "split_k" and K > 0:
        per_split = -(-K // (config.splits * config.block_k)) * config.block_k
        splits = -(-K // per_split)
        part = torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
        kernel, grid = kernels().split_k.linear_split_k_kernel, splits * _tiles(M, N, config)
        launch(kernel, grid, x, x, weight, part, M, N, K, per_split, **xw, **options)
        _reduce(part, splits, b, y, pre, xs, ws, strides, epilogue)
    else:
        options["GROUP_M"] = config.group_m
        kernel = kernels().fwd.linear_fwd_kernel
        sizes = (M, N, K)
        launch(
            kernel, _tiles(M, N, config), x, x, weight, b, y, pre, xs, ws, *sizes,
            **xw, stride_ym=N, **strides, **epilogue, **options,
        )  # fmt: skip


def _reduce(
    part: Tensor, splits: int, b: Tensor, y: Tensor, pre: Tensor, xs: Tensor, ws: Tensor,
    strides: dict[str, int], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    """y and pre from the partial products: part (splits, M, N) fp32."""
    M, N = y.numel() // y.shape[-1], y.shape[-1]
    block = kernels().split_k.REDUCE_BLOCK
    launch(
        kernels().split_k.linear_reduce_kernel, -(-M * N // block), part, part, b, y, pre, xs, ws, M, N, splits,
        **strides, **epilogue, BLOCK=block, num_warps=4,
    )  # fmt: skip


def matmul_epilogue(product: Tensor, bias: Tensor | None, y: Tensor, activation: str) -> None:
    """y = act(product + bias), and product += bias in place: what follows a product that cuBLAS made. (M, N), fp32."""
    epilogue = {"ACT": activation, "HAS_BIAS": bias is not None, "SAVE_PRE": y is not product, "HAS_SCALE": False}
    strides = {"stride_b": 0 if bias is None else bias.stride(0), "stride_xs": 0, "stride_ws": 0}
    _reduce(product, 1, product if bias is None else bias, y, product, product, product, strides, epilogue)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b: cuBLAS on a GPU, which has nothing to fuse here; our kernel when interpreting or forced."""
    if a.is_cuda and _forced is None:
        torch.mm(a, b, out=out)
    else:
        matmul(a, b.t(), None, out, out, "none", False)


def product_sum(a: Tensor, b: Tensor, c: Tensor, d: Tensor, out: Tensor) -> None:
    """out = a @ b + c @ d, rounded once. a, c (M, K) contiguous; b, d (K, N) any strides; out (M, N) contiguous."""
    if a.is_cuda and a.dtype is torch.float32 and _forced is None:
        torch.mm(a, b, out=out).addmm_(c, d)
        return
    (M, K), N = a.shape, b.shape[1]
    config = _config(a, (b.t(), d.t()), "fwd")
    if config.kind == "split_k":
        config = dataclasses.replace(config, kind="pointer", block_k=64)
    strides = {"stride_bk": b.stride(0), "stride_bn": b.stride(1), "stride_dk": d.stride(0), "stride_dn": d.stride(1)}
    if config.kind == "tma":
        (b_t, stride_b), (_, stride_d) = _tma_layout(b), _tma_layout(d)  # type: ignore[misc]
        ensure_allocator()
        launch(
            kernels().gated_bwd.product_sum_tma_kernel, min(device_facts(a)[1], _tiles(M, N, config)), a,
            a, b, c, d, out, M, N, K, stride_b=stride_b, stride_d=stride_d, B_T=b_t, SUBTILES=config.subtiles,
            **_common(a, config),
        )  # fmt: skip
    else:
        kernel, grid = kernels().gated_bwd.product_sum_kernel, _tiles(M, N, config)
        launch(kernel, grid, a, a, b, c, d, out, M, N, K, **strides, **_common(a, config))


def matmul_dact(dy: Tensor, w: Tensor, saved: Tensor, dpre: Tensor, h: Tensor | None, activation: str, need_db: bool) -> Tensor:
    """dpre = (dy @ w) * act'(saved), h = act(saved) where given; returns db's partial sums (P, N) fp32, or dpre.

    dy (M, K), w (K, N) any strides; saved, dpre, h (M, N) contiguous.
    """
    (M, K), N = dy.shape, w.shape[1]
    config = _config(dy, (w.t(),), "dact", saved)
    parts = torch.empty((-(-M // config.block_m), N), dtype=torch.float32, device=dy.device) if need_db else dpre
    flags = {"ACT": activation, "NEED_H": h is not None, "NEED_DB": need_db}
    tensors = (dy, w, saved, dpre, dpre if h is None else h, parts)
    if config.kind == "tma":
        (x_t, stride_x), (w_t, stride_w) = _tma_layout(dy), _tma_layout(w.t())  # type: ignore[misc]
        launch_tma(
            kernels().tma.linear_dact_tma_kernel, dy, M, N, config, *tensors, M, N, K, stride_x=stride_x, stride_w=stride_w,
            X_T=x_t, W_T=w_t, SUBTILES=config.subtiles, **flags, **_common(dy, config),
        )  # fmt: skip
    else:
        launch(
            kernels().bwd.linear_dact_kernel, _tiles(M, N, config), dy, *tensors, M, N, K,
            stride_xm=dy.stride(0), stride_xk=dy.stride(1), stride_wn=w.stride(1), stride_wk=w.stride(0),
            **flags, **_common(dy, config),
        )  # fmt: skip
    return parts


def act_bwd(
    dy: Tensor, saved: Tensor, activation: str, need_dpre: bool, need_db: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dpre = dy * act'(saved) (M, N) in dtype (dy itself without an activation), and db (N,); dy of any strides."""
    bwd = kernels().bwd
    M, N = dy.shape
    rows = bwd.linear_act_bwd_rows(M, N, device_facts(dy)[1])
    write = need_dpre and activation != "none"
    dpre = torch.empty((M, N), dtype=dtype, device=dy.device) if write else dy
    parts = torch.empty((-(-M // rows), N), dtype=torch.float32, device=dy.device) if need_db else dpre
    if write or need_db:
        launch(
            bwd.linear_act_bwd_kernel, -(-M // rows) * -(-N // bwd.ACT_BWD_BLOCK_N), dy,
            dy, saved.contiguous(), dpre, parts, M, N, rows,
            stride_dym=dy.stride(0), stride_dyn=dy.stride(1), stride_sm=N, stride_dpm=N,
            ACT=activation, NEED_DPRE=write, NEED_DB=need_db,
            BLOCK_M=bwd.ACT_BWD_BLOCK_M, BLOCK_N=bwd.ACT_BWD_BLOCK_N, num_warps=bwd.ACT_BWD_WARPS,
        )  # fmt: skip
    return dpre, column_sum(parts, dtype) if need_db else dy.new_empty((0,))
