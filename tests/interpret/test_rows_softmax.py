"""Every variant of the softmax kernels, forced by its configuration at sizes where the chooser would not take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_ops import REGISTRY, fused_softmax
from fused_ops.testing import ContractMode
from tests.interpret.row_variants import HALF, LAYOUTS, SOFTMAX_CONFIGS, SUFFIXES, UNPACKABLE, layouts

SOFTMAX_CASES = [
    (variant, layout, dtype)
    for variant in SOFTMAX_CONFIGS
    for layout in LAYOUTS
    for dtype in (HALF if variant.startswith("packed") else (torch.float32, torch.bfloat16))
    if not variant.startswith("packed") or layout not in UNPACKABLE
]


@pytest.mark.parametrize(("variant", "layout", "dtype"), SOFTMAX_CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_softmax_forward(force: Any, variant: str, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.softmax import softmax

    x = layouts(dtype)[layout]
    launched = force(softmax, "softmax_fwd_config", SOFTMAX_CONFIGS[variant])
    with ContractMode():
        REGISTRY["softmax"].fwd(x, 1, None)
    assert set(launched) == {f"softmax_fwd{SUFFIXES.get(variant, '')}_kernel"}


@pytest.mark.parametrize(("variant", "layout", "dtype"), SOFTMAX_CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_softmax_backward(force: Any, variant: str, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.softmax import softmax

    dy = layouts(dtype)[layout]
    if layout == "special":
        dy = dy.nan_to_num(0.5, 2.0, -2.0)
    y = torch.softmax(dy.flip(0).float(), -1).to(dtype)
    launched = force(softmax, "softmax_bwd_config", SOFTMAX_CONFIGS[variant])
    with ContractMode():
        REGISTRY["softmax"].bwd(dy, y, 1, dtype)
    assert set(launched) == {f"softmax_bwd{SUFFIXES.get(variant, '')}_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_to_another_dtype(force: Any, dtype: torch.dtype) -> None:
    from fused_ops.kernels.softmax import softmax

    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    for variant in ("tile", "chunked", "cluster"):
        force(softmax, "softmax_fwd_config", SOFTMAX_CONFIGS[variant])
        with ContractMode():
            REGISTRY["softmax"].fwd(layouts(dtype)["odd"], 1, other)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32, torch.int16, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_softmax_from_dtypes_without_a_kernel(dtype: torch.dtype, dim: int) -> None:
    """Integers that no float of 32 bits tells apart, too."""
    numbers = torch.arange(45, dtype=torch.float64).reshape(5, 9) * 7 % 10
    x = (numbers + (2**31 if dtype in (torch.int64, torch.uint32) else 0)).to(dtype)
    for out in (torch.float32, torch.bfloat16):
        with ContractMode() as mode:
            assert fused_softmax(x, dim, dtype=out).dtype is out
        assert mode.checked == ["fused_ops.softmax_fwd.default"]
