"""The variants of the row kernels by their configurations, and the layouts that each must read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops.kernels.config import RowConfig
from fused_ops.testing import watch_launches

INF, NAN = float("inf"), float("nan")
HALF = (torch.float16, torch.bfloat16)
SOFTMAX_CONFIGS = {
    "tile": RowConfig(4, 256, 4),
    "row": RowConfig(1, 256, 1),
    "packed": RowConfig(1, 256, 4, "packed"),
    "chunked": RowConfig(1, 64, 2, "chunked"),
    "cluster": RowConfig(1, 256, 2, num_ctas=4),
    "packed_cluster": RowConfig(1, 256, 2, "packed", num_ctas=4),
}
SUFFIXES = {"packed": "_packed", "packed_cluster": "_packed", "chunked": "_chunked", "cluster": "_cluster"}
LAYER_NORM_CONFIGS = {
    "tile": RowConfig(4, 256, 4),
    "row": RowConfig(1, 256, 1),
    "chunked": RowConfig(1, 64, 2, "chunked"),
    "chunked_tile": RowConfig(4, 64, 2, "chunked"),
}
WIDE_KERNELS = ("norm_bwd_chunked_sums_kernel", "norm_bwd_chunked_columns_kernel")  # of the norms' chunked backwards


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The launches from here on, as (kernel, programs a cluster); they are made."""
    launched: list[tuple[str, int]] = []

    def spy(kernel: Any, _grid: int, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        launched.append((kernel.__name__, kwargs.get("num_ctas", 1)))
        return False

    watch_launches(spy)
    return launched


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """(M, N) matrices whose rows start at 16 bytes, anywhere, or anywhere with a stride of their own."""
    generator = torch.Generator().manual_seed(1)

    def r(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 3).to(dtype)

    special = r(9, 201)
    for i, value in enumerate((-INF, INF, NAN)):
        special[i, 0] = special[3 + i, 200] = special[6 + i, 100] = value  # head, tail and aligned part
    special[7] = -INF
    special[8, :100] = -INF
    return {
        "aligned": r(5, 256),
        "odd": r(9, 197),
        "even": r(9, 198),
        "groups_of_8": r(5, 200),
        "short_odd": r(9, 65),
        "odd_stride": r(9, 205)[:, :101],
        "other_stride": r(9, 208)[:, :101],
        "column_stride": r(5, 400)[:, ::2],
        "offset": r(2000)[3 : 3 + 9 * 199].view(9, 199),
        "special": special,
    }


LAYOUTS = list(layouts(torch.float32))
UNPACKABLE = ("other_stride", "column_stride")  # the launcher never asks for the packed kernels here
