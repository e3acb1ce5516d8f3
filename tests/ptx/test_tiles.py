"""Row backwards whose programs take several tiles of rows each, as compiled: what one tile leaves behind is the next one's."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops import REGISTRY
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import KERNELS, ContractMode, Op, forced
from tests.contract import leaves
from tests.ptx.device import device

CONFIGS = {"one_pass": RowConfig(1, 512, 4), "chunked": RowConfig(2, 256, 4, "chunked")}
OPS = [op for op in REGISTRY.values() if op.tuned and " v" in op.roles.inputs]


def backward(op: Op, variant: str) -> list[Any]:
    """The launches of a backward over 5 rows of 500 columns by one program, two chunks a row where it is chunked."""
    (x, *others), kwargs = op.bench.make("cpu", (5, 500), torch.float32, None)
    args, wanted = leaves((x, *others))
    config = CONFIGS[variant]
    with forced(f"{op.name}_bwd", config), device(90, sms=1) as gpu, ContractMode() as mode:
        torch.autograd.grad(op.public(*args, **kwargs), wanted, torch.randn(x.shape))
    assert len(mode.checked) == 2
    launches = [launch for launch in gpu.launches if launch.kernel.startswith(f"{op.name}_bwd")]
    assert launches
    assert all(launch.programs * config.block_m < 5 and ("chunked" in launch.kernel) == config.chunked for launch in launches)
    return launches


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_several_tiles(op: Op, variant: str) -> None:
    assert variant in KERNELS[f"{op.name}_bwd"].variants
    backward(op, variant)
