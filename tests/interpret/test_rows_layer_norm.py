"""Every variant of the layer norm kernels, forced by its configuration at sizes where the chooser would not take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_ops import REGISTRY, fused_layernorm
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import ContractMode
from tests.interpret.row_variants import LAYER_NORM_CONFIGS, LAYOUTS, WIDE_KERNELS, layouts

LAYER_NORM_CASES = [  # fp16 loads other vectors: of the variants, tile and chunked in every run
    pytest.param(
        variant,
        layout,
        dtype,
        marks=() if dtype is torch.float32 or variant in ("tile", "chunked") else (pytest.mark.slow,),
    )
    for variant in LAYER_NORM_CONFIGS
    for layout in LAYOUTS
    for dtype in (torch.float32, torch.float16)
    if layout != "special" and (dtype is torch.float32 or layout in ("odd", "groups_of_8"))
]


@pytest.mark.parametrize(("variant", "layout", "dtype"), LAYER_NORM_CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_norm(force: Any, variant: str, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.norm import layer_norm, layer_norm_bwd

    config = LAYER_NORM_CONFIGS[variant]
    x = layouts(dtype)[layout] + 3
    w, b = torch.randn(2, x.shape[1]).to(dtype)
    suffix = "_chunked" if config.chunked else ""
    launched = force(layer_norm, "layer_norm_fwd_config", config)
    force(layer_norm_bwd, "layer_norm_bwd_config", config)
    spec = REGISTRY["layer_norm"]
    with ContractMode():
        _, mean, rstd = spec.fwd(x, w, b, 1e-5)
        assert set(launched) == {f"layer_norm_fwd{suffix}_kernel"}
        dy = layouts(dtype)["odd" if layout == "aligned" else layout][:, : x.shape[1]]
        if dy.shape != x.shape:
            dy = torch.randn(x.shape[::-1]).to(dtype).t()
        launched.clear()
        spec.bwd(dy, x, w, mean, rstd, True, True, True, dtype)
    assert set(launched) == (set(WIDE_KERNELS) if config.chunked else {"layer_norm_bwd_kernel"})


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_norm_clusters(force: Any, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.norm import layer_norm

    x = layouts(dtype)[layout] + 3
    w, b = torch.randn(2, x.shape[1]).to(dtype)
    launched = force(layer_norm, "layer_norm_fwd_config", RowConfig(1, 256, 2, num_ctas=4))
    spec = REGISTRY["layer_norm"]
    with ContractMode():
        for weight, bias in ((w, b), (None, b), (w.float(), None)):
            spec.fwd(x, weight, bias, 1e-5)
        expected = torch.nn.functional.layer_norm(x.float(), x.shape[1:], w.float(), b.float())
        torch.testing.assert_close(fused_layernorm(x, x.shape[1:], w, b).float(), expected, rtol=2e-3, atol=2e-3)
    assert set(launched) == {"layer_norm_fwd_cluster_kernel"}


@pytest.mark.parametrize("variant", ["tile", "row", "chunked"])
@pytest.mark.parametrize("N", [67, 68])
@pytest.mark.parametrize("M", [1, 7, 8, pytest.param(75, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_norm_of_rows_that_start_anywhere(force: Any, variant: str, N: int, M: int) -> None:
    from fused_ops.kernels.norm import layer_norm

    force(layer_norm, "layer_norm_fwd_config", LAYER_NORM_CONFIGS[variant])
    x = (torch.randn(M, N) + 100).half()
    w, b = torch.randn(2, N)
    with ContractMode():
        first = REGISTRY["layer_norm"].fwd(x, w, b, 1e-5)
    for out, again in zip(first, REGISTRY["layer_norm"].fwd(x, w, b, 1e-5)):
        assert torch.equal(out, again)


@pytest.mark.parametrize("variant", LAYER_NORM_CONFIGS)
@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_layer_norm_backward_of_what_is_needed(force: Any, variant: str, needs: tuple[int, int, int]) -> None:
    from fused_ops.kernels.norm import layer_norm_bwd

    force(layer_norm_bwd, "layer_norm_bwd_config", LAYER_NORM_CONFIGS[variant])
    x, dy = torch.randn(2, 21, 130)
    w = torch.randn(130, dtype=torch.bfloat16)
    spec = REGISTRY["layer_norm"]
    _, mean, rstd = spec.fwd(x, w, None, 1e-5)
    with ContractMode():
        spec.bwd(dy, x, w, mean, rstd, *map(bool, needs), torch.float16)
