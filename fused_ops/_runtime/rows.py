"""A tensor as rows of its last dimension, and the sum over rows that ends a deterministic reduction."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .compiled import Planned
from .launch import launch_grid
from .plans import plan


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


def no_columns(x: Tensor) -> tuple[Tensor, int, int, int]:
    """rows_and_strides of x (..., 0), which a product may have."""
    M = math.prod(x.shape[:-1])
    return x.new_empty((M, 0)), M, 1, 1


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


def at_vectors(*tensors: Tensor) -> bool | None:
    """Whether all begin at multiples of 16 bytes, as 128-bit loads and TMA need.

    None where they do so in their storage and have no address, as the tensors that a compiler traces with.
    """
    try:
        for tensor in tensors:
            if tensor.data_ptr() & 15:
                return False
    except RuntimeError:
        return False if any(tensor.storage_offset() * tensor.element_size() & 15 for tensor in tensors) else None
    return True


@functools.cache
def _reduce() -> Any:
    from ..kernels import reduce

    return reduce


@plan
def _column_sum_plan(row_bits: int, N: int, stride_pp: int, first: torch.dtype, second: torch.dtype, device: int) -> Planned:
    """The launch of the second stage over up to 2 ** row_bits partial rows."""
    reduce = _reduce()
    block_p, block_n = reduce.column_sum_blocks(1 << row_bits)
    options = {"N": N, "stride_pp": stride_pp, "BLOCK_P": block_p, "BLOCK_N": block_n}
    return Planned(device, reduce.column_sum_kernel, options, across=-(-N // block_n))


def column_sum(part: Tensor, dtype: torch.dtype) -> Tensor:
    """part (P, N) fp32 summed over P, as (N,) in dtype: the second stage of a deterministic reduction."""
    P, N = part.shape
    out = part.new_empty((N,), dtype=dtype)
    planned = _column_sum_plan((P - 1).bit_length(), N, part.stride(0), dtype, dtype, part.get_device())
    launch_grid(planned, planned.across, (P,), part, out, out)
    return out


def column_sums(parts: Tensor, first: torch.dtype, second: torch.dtype) -> tuple[Tensor, Tensor]:
    """(parts[0].sum(0) in dtype first, parts[1].sum(0) in dtype second), in one launch. parts (2, P, N) fp32, contiguous."""
    _, P, N = parts.shape
    a, b = parts.new_empty((N,), dtype=first), parts.new_empty((N,), dtype=second)
    planned = _column_sum_plan((P - 1).bit_length(), N, N, first, second, parts.get_device())
    launch_grid(planned, 2 * planned.across, (P,), parts, a, b)
    return a, b
