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


def finite(scale: Tensor) -> Tensor:
    """A bound's scale, 0 where it is no number: a result of NaN or infinite terms is compared by place."""
    return scale.nan_to_num(0.0, 0.0)


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each value may move when it is rounded to dtype, in units of 2^-24: half its spacing, which is that of the
    smallest normal number below it."""
    info = torch.finfo(dtype)
    return 0.505 * info.eps * 2**24 * values.abs().clamp(min=info.smallest_normal)
