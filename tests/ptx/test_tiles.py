"""Row backwards whose programs take several tiles of rows each, as compiled: what one tile leaves behind is the next one's."""

from __future__ import annotations

import re
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops import REGISTRY
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import KERNELS, ContractMode, Op, forced
from fused_ops.testing.ptx.gpu import altered, device
from fused_ops.testing.ptx.knowledge import MemoryFaultError
from tests.contract import leaves

CONFIGS = {
    "one_pass": RowConfig(1, 512, 4),
    "chunked": RowConfig(2, 256, 4, "chunked"),
    "chunked_repeated": RowConfig(4, 128, 8, "chunked"),  # several warps hold each column, one of which writes it
}
OPS = [op for op in REGISTRY.values() if op.tuned and " v" in op.roles.inputs]


def backward(op: Op, name: str, alone: bool = False) -> None:
    """A backward over 5 rows of 500 columns by one program, several chunks a row where it is chunked. alone: the last gradient only."""
    (x, *others), kwargs = op.bench.make("cpu", (5, 500), torch.float32, None)
    args, wanted = leaves((x, *others))
    for leaf in wanted[: len(wanted) - 1] if alone else []:
        leaf.requires_grad_(False)
    config = CONFIGS[name]
    with forced(f"{op.name}_bwd", config), device(90, sms=1) as gpu, ContractMode() as mode:
        torch.autograd.grad(op.public(*args, **kwargs), wanted[-1:] if alone else wanted, torch.randn(x.shape))
    assert len(mode.checked) == 2
    launches = [launch for launch in gpu.launches if launch.kernel.startswith(f"{op.name}_bwd")]
    assert launches
    assert all(launch.programs * config.block_m < 5 and ("chunked" in launch.kernel) == config.chunked for launch in launches)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_several_tiles(op: Op, name: str) -> None:
    assert CONFIGS[name].variant in KERNELS[f"{op.name}_bwd"].variants
    backward(op, name, alone=name == "chunked_repeated")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_barrier_between_tiles_is_needed(op: Op) -> None:
    """The next tile reads back the partial row: without the barrier before it, what another warp may not have written yet."""

    def without(ptx: str) -> str:
        if "_bwd_chunked" not in ptx:
            return ptx
        before, after = re.split(r"bar\.sync\s+0;(?!.*bar\.sync)", ptx, flags=re.DOTALL)
        return before + after

    with pytest.raises(MemoryFaultError, match="and nothing orders the two"), altered(without):
        backward(op, "chunked_repeated", alone=True)
