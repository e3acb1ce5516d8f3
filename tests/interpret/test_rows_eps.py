"""eps is added inside the root, in every variant of the norms' kernels: seen where a row's spread is smaller than eps."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import ContractMode, Op
from tests.interpret.row_variants import LAYER_NORM_CONFIGS

VARIANTS = {name: LAYER_NORM_CONFIGS[name] for name in ("tile", "chunked")} | {"cluster": RowConfig(1, 256, 2, num_ctas=4)}
NORMS = [op for op in REGISTRY.values() if " v" in op.roles.inputs]
EPS = 1e-5
CASES = [
    pytest.param(op, config, id=f"{op.name}-{name}")
    for op in NORMS
    for name, config in VARIANTS.items()
    if config.num_ctas == 1 or (op.tuned and op.tuned.clustered)
]


@pytest.mark.parametrize(("op", "config"), CASES)
def test_a_spread_below_eps(force: Any, op: Op, config: RowConfig) -> None:
    module = importlib.import_module(f"fused_ops.kernels.norm.{op.name}")
    chooser = next(name for name in (f"{op.name}_fwd_config", f"{op.name}_config") if hasattr(module, name))
    launched = force(module, chooser, config)
    x = torch.randn(5, 197) * 1e-3
    assert x.var() < EPS
    given = [x if role == "x" else torch.randn(197) for role in op.roles.inputs.split() if role in "xv"]
    with ContractMode() as mode:
        op.fwd(*given, EPS)
    assert len(mode.checked) == 1
    assert len(set(launched)) == 1
