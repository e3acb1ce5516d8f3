"""Every variant of the RMS norm kernels, forced by its configuration at sizes where the chooser would not take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops.testing import ContractMode
from tests.interpret.row_variants import LAYER_NORM_CONFIGS, WIDE_KERNELS, layouts

LAYOUTS = ("odd", "groups_of_8", "odd_stride", "column_stride", "offset")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", LAYER_NORM_CONFIGS)
@pytest.mark.usefixtures("poisoned_memory")
def test_rms_norm(force: Any, variant: str, layout: str) -> None:
    from fused_ops.kernels.norm import rms_norm

    config = LAYER_NORM_CONFIGS[variant]
    x = layouts(torch.float16)[layout]
    w, dy = torch.randn(x.shape[1]), torch.randn(x.shape[::-1]).half().t()
    force(rms_norm, "rms_norm_fwd_config", config)
    launched = force(rms_norm, "rms_norm_bwd_config", config)
    spec = REGISTRY["rms_norm"]
    with ContractMode() as mode:
        _, rstd = spec.fwd(x, w, 1e-5)
        spec.bwd(dy, x, w, rstd, True, True)
    assert len(mode.checked) == 2
    one_pass = ("rms_norm_fwd_kernel", "rms_norm_bwd_kernel")
    assert set(launched) == set(("rms_norm_fwd_chunked_kernel", *WIDE_KERNELS) if config.chunked else one_pass)
