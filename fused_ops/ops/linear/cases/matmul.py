"""What the audited calls of all matmul families share."""

from __future__ import annotations

import torch
from torch import Tensor

from ...case_builders import empty


def operand(rows: int, columns: int, layout: str, device: str, dtype: torch.dtype) -> Tensor:
    """An uninitialised (rows, columns) operand.

    layout: "", contiguous and aligned; "transposed"; "odd sizes": one row and column less, so that no size or stride is a
    multiple of 16; or "odd": that at an odd address.
    """
    if layout in ("odd", "odd sizes"):
        return empty(rows - 1, columns - 1, device=device, dtype=dtype, start=int(layout == "odd"))
    if layout == "transposed":
        return empty(columns, rows, device=device, dtype=dtype).t()
    return empty(rows, columns, device=device, dtype=dtype)
