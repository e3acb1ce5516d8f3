"""Which kernel computes a matmul, and with which configuration: `linear_plan` says, and why.

Every product is x @ w^T with x (M, K) and w (N, K) of any strides. No operand is ever copied: what TMA cannot describe,
the pointer kernels read. (Leading dimensions of an input that do not collapse into one M are the one copy, made before,
by `rows_of`.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._runtime.device import FP8, device_properties, interpreting
from ..._torch.compile import is_traced

if TYPE_CHECKING:
    from ...kernels.config import MatmulConfig

FP8_CHUNK = 128  # products that Hopper's fp8 tensor cores may sum in their own, narrower, accumulator

_forced: MatmulConfig | None = None


@functools.cache
def kernels() -> Any:
    """The kernel modules, imported when first needed."""
    from ...kernels import config
    from ...kernels.linear import linear, linear_bwd, linear_config, linear_gated, linear_gated_bwd, linear_splitk, linear_tma

    return SimpleNamespace(
        config=config, fwd=linear, bwd=linear_bwd, choose=linear_config.linear_config, gated=linear_gated,
        gated_bwd=linear_gated_bwd, split_k=linear_splitk, tma=linear_tma,
    )  # fmt: skip


@contextlib.contextmanager
def forced_config(config: MatmulConfig) -> Iterator[None]:
    """While active, every matmul that can run with this configuration does. For tuning and tests; not thread-safe."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


def forced() -> MatmulConfig | None:
    """The configuration of the active forced_config."""
    return _forced


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
    return Plan("triton", "bias and activation in the matmul's epilogue", config_of(x, (weight,), use))


def fp32_on_cublas(x: Tensor) -> bool:
    """Whether cuBLAS computes products of x, and kernels of ours only what surrounds them: fp32 on a GPU."""
    return x.is_cuda and x.dtype is torch.float32 and _forced is None


def config_of(x: Tensor, weights: tuple[Tensor, ...], use: str, tile: Tensor | None = None) -> MatmulConfig:
    """The configuration for x (M, K) times weights (N, K). tile: a tensor that the epilogue reads, if any."""
    (M, K), N = x.shape, weights[0].shape[0]
    access = _access(x, weights, N) if tile is None or not _misaligned(tile) else "any"
    if (
        _forced is not None
        and (_forced.kind != "tma" or access == "tma")
        and (_forced.kind != "split_k" or use in ("fwd", "fp8"))
    ):
        return _forced
    return kernels().choose(M, N, K, x.element_size(), *device_properties(x), access, use)


def _access(x: Tensor, weights: tuple[Tensor, ...], N: int) -> str:
    """How the operands can be read: "tma", "aligned" (128-bit loads), or "any"."""
    if any(_misaligned(t) for t in (x, *weights)):
        return "any"
    layouts = tuple((tuple(t.shape), t.stride()) for t in (x, *weights))
    access = _access_of(layouts, x.element_size(), N)
    return "aligned" if access == "tma" and is_traced(x) else access


@functools.lru_cache(maxsize=4096)
def _access_of(layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], itemsize: int, N: int) -> str:
    """The access of operands that begin at 16-byte boundaries, by (shape, strides) of each; N columns of output."""
    found = [_layout(shape, strides, itemsize) for shape, strides in layouts]
    if None in found:
        return "any"
    if itemsize == 4 or N * max(itemsize, 2) % 16 or layouts[0][0][1] == 0:  # y's rows begin at 16-byte boundaries too
        return "aligned"
    transposed = [layout[0] for layout in found if layout]
    same = len(set(transposed[1:])) == 1  # a gated linear's weights
    return "tma" if same and (itemsize == 2 or not any(transposed)) else "aligned"  # fp8 tensor cores read along K


def _misaligned(t: Tensor) -> bool:
    """Whether t starts at no 16-byte boundary. A tensor that is being traced has no address: its offset counts."""
    address = t.storage_offset() * t.element_size() if is_traced(t) else t.data_ptr()
    return address % 16 != 0


def tma_layout(t: Tensor) -> tuple[bool, int] | None:
    """(whether t is stored transposed, its row stride) where TMA's stride rules hold, else None."""
    return _layout(tuple(t.shape), t.stride(), t.element_size())


@functools.lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[bool, int] | None:
    for transposed in (False, True):
        rows, cols = (1, 0) if transposed else (0, 1)
        if strides[cols] == 1 and strides[rows] * itemsize % 16 == 0 and strides[rows] >= shape[cols]:
            return transposed, strides[rows]
    return None


def precision_of(dtype: torch.dtype, cuda: bool) -> str:
    """How products are multiplied: "tf32" where torch's setting, old or new, says so for fp32 on a GPU; else "ieee"."""
    return "tf32" if cuda and dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def common(x: Tensor, config: MatmulConfig, group: bool = True) -> dict[str, Any]:
    """The keyword arguments that all matmul kernels take."""
    options = {
        "PRECISION": precision_of(x.dtype, x.is_cuda), "WIDEN": interpreting() and x.dtype in (torch.bfloat16, FP8),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    return options | {"GROUP_M": config.group_m} if group else options


def tiles(M: int, N: int, config: MatmulConfig) -> int:
    return -(-M // config.block_m) * -(-N // config.block_n)
