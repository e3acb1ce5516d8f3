"""A tensor as rows of its last dimension, and the sum over rows that ends a deterministic reduction."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .launch import launch


def rows_of(x: Tensor) -> Tensor:
    """x as (M, N), N its last dimension: a view where the leading dimensions collapse, else a copy."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)


def rows_and_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x as rows, M, row stride, column stride) for the last dimension, without a view where x is contiguous."""
    if x.is_contiguous():
        N = x.shape[-1]
        return x, x.numel() // N, N, 1
    rows = rows_of(x)
    return rows, rows.shape[0], rows.stride(0), rows.stride(1)


def at_pairs(x: Tensor) -> bool:
    """Whether x begins at a multiple of 4 bytes, as a kernel needs that loads 16-bit floats two at a time.

    A view may begin at any element. A compiler's tensor without memory counts as aligned: what compiles copies one that is not.
    """
    try:
        return not x.data_ptr() & 3
    except RuntimeError:
        return True


def empty_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous, uninitialised tensor of x's shape."""
    if x.dtype is dtype and x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)  # one element may have any stride
    return x.new_empty(x.shape, dtype=dtype)


@functools.cache
def _reduce() -> Any:
    from ..kernels import reduce

    return reduce


def column_sum(part: Tensor, dtype: torch.dtype) -> Tensor:
    """part (P, N) fp32 summed over P, as (N,) in dtype: the second stage of a deterministic reduction."""
    return column_sums(part.unsqueeze(0), dtype, dtype)[0]


def column_sums(parts: Tensor, first: torch.dtype, second: torch.dtype) -> list[Tensor]:
    """[parts[0].sum(0) in dtype first, parts[1].sum(0) in dtype second], in one launch.

    parts (1 or 2, P, N) fp32, contiguous but for a larger row stride.
    """
    reduce = _reduce()
    S, P, N = parts.shape
    out = [torch.empty((N,), dtype=dtype, device=parts.device) for dtype in (first, second)[:S]]
    blocks = {"BLOCK_P": reduce.COLUMN_SUM_BLOCK_P, "BLOCK_N": reduce.COLUMN_SUM_BLOCK_N}
    grid = S * -(-N // blocks["BLOCK_N"])
    launch(reduce.column_sum_kernel, grid, parts, parts, out[0], out[-1], P, N, stride_pp=parts.stride(1), **blocks)
    return out
