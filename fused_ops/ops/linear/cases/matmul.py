"""What the audited calls of all matmul families share."""

from __future__ import annotations

import torch
from torch import Tensor

from ...case_builders import empty


def operand(rows: int, columns: int, layout: str, device: str, dtype: torch.dtype) -> Tensor:
    """An uninitialised (rows, columns) operand.

    layout: "", contiguous and aligned; "transposed"; or "odd": one row and column less, at an odd address, so that no size,
    stride or pointer is a multiple of 16.
    """
    if layout == "odd":
        return empty(rows - 1, columns - 1, device=device, dtype=dtype, start=1)
    if layout == "transposed":
        return empty(columns, rows, device=device, dtype=dtype).t()
    return empty(rows, columns, device=device, dtype=dtype)
