"""Row lengths that choose each variant of the row kernels, first of all those that nothing but a GPU can execute: rows kept
packed (long), loads from an aligned window (odd lengths and odd strides), chunked rows, and whole-row tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import Expected, assert_within_contract

from .hold import DTYPE_IDS, DTYPES, hold

pytestmark = pytest.mark.gpu

LENGTHS = (65536, 50257, 32768, 197, 128256, 16384, 16383, 40961, 4096, 8191, 257, 64)
ROWS = 264  # two an SM of an H100: every program of a persistent grid has work
LAYOUTS = ("contiguous", "odd_stride", "offset")


def rows(N: int, dtype: torch.dtype, layout: str) -> Tensor:
    """(ROWS, N) whose rows start 16-byte aligned, or at an odd stride, or one element off."""
    if layout == "contiguous":
        return torch.randn(ROWS, N, device="cuda").to(dtype)
    if layout == "odd_stride":
        return torch.randn(ROWS, N + 3 - N % 2, device="cuda").to(dtype)[:, :N]
    return torch.randn(ROWS * N + 1, device="cuda").to(dtype)[1:].view(ROWS, N)


def arguments(op: str, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of a row op for x; None for another op."""
    N = x.shape[-1]
    w, b = torch.randn(2, N, device=x.device).to(x.dtype)
    return {
        "softmax": ((x,), {"dim": -1}),
        "log_softmax": ((x,), {"dim": -1}),
        "layer_norm": ((x, (N,), w, b), {}),
        "rms_norm": ((x, (N,), w), {}),
    }.get(op)


def points() -> list[Any]:
    """(dtype, layout, N): bf16 in every length and layout, the other dtypes where the bytes of a row choose otherwise."""
    bf16 = [(0, layout, N) for layout in LAYOUTS for N in (LENGTHS if layout == "contiguous" else LENGTHS[:8])]
    others = [(dtype, "contiguous", N) for dtype in (1, 2) for N in LENGTHS[:5]]
    return [pytest.param(DTYPES[d], layout, N, id=f"{DTYPE_IDS[d]}-{layout}-{N}") for d, layout, N in (*bf16, *others)]


@pytest.mark.parametrize(("dtype", "layout", "N"), points())
@pytest.mark.parametrize("op", [name for name in REGISTRY if arguments(name, torch.empty(1, 1)) is not None])
def test_row_length(op: str, dtype: torch.dtype, layout: str, N: int) -> None:
    args, kwargs = arguments(op, rows(N, dtype, layout)) or ((), {})
    hold(REGISTRY[op], args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=DTYPE_IDS[:2])
def test_packed_rows_with_infinities(dtype: torch.dtype) -> None:
    """A long row whose first half is -inf, one that is all -inf (NaN, as torch gives), and one with a single +inf."""
    x = torch.randn(4, 65536, device="cuda").to(dtype)
    x[0, :32768] = float("-inf")
    x[1] = float("-inf")
    x[2, 5] = float("inf")
    y = REGISTRY["softmax"].public(x, -1)
    exact = F.softmax(x.double(), -1)
    distance = (x.double() - x.double().amax(-1, keepdim=True)).abs().nan_to_num(0.0, 0.0)
    assert_within_contract(y, Expected(exact, (exact * (256 + distance)).nan_to_num(0.0, 0.0)))
