"""Rows held by clusters of programs, as compiled, executed without a GPU. Needs a Triton that compiles clusters.

`make tritons` runs this folder under the newest supported Triton too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton

from fused_ops import fused_layernorm, fused_softmax
from fused_ops._runtime import settings
from fused_ops.testing import ContractMode, forget_plans
from fused_ops.testing.ptx.gpu import altered, device
from fused_ops.testing.ptx.knowledge import MemoryFaultError

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
pytestmark = pytest.mark.skipif(VERSION < (3, 8), reason=f"Triton {triton.__version__} compiles no clusters, 3.8 does")
ROWS = 3


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "CLUSTER", True)
    monkeypatch.setattr(settings, "GLUON", False)  # it comes before clusters
    forget_plans()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("N", [65536, 128256, 131071, 256000, 262143])
def test_rows(N: int, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, N).mul_(3).to(dtype)
    x[1, :-3] = -math.inf  # all but the last program's part
    x.requires_grad_()
    w, b = torch.randn(2, N).to(dtype)
    with device(90) as gpu, ContractMode() as mode, torch.no_grad():
        y = fused_softmax(x)
        fused_layernorm(x.detach().nan_to_num(0.0, 0.0, 0.0), (N,), w, b)
    with device(90) as gpu_bwd, ContractMode():
        z = fused_softmax(x)
        z.backward(torch.randn(x.shape).to(dtype))
    assert len(mode.checked) == 2
    assert torch.equal(y, z)
    clusters = [launch for launch in (*gpu.launches, *gpu_bwd.launches) if launch.compiled.metadata.num_ctas > 1]
    assert {launch.compiled.metadata.num_ctas for launch in clusters} == {8}
    assert clusters
    for launch in clusters:
        assert launch.remote_reads > 0
        tensors = 2 if "_bwd" in launch.kernel else 1
        sectors = ROWS * N * dtype.itemsize / 32
        extra = 2 * math.ceil(N * dtype.itemsize / 32) if "layer_norm" in launch.kernel else 0
        assert launch.traffic.load_once <= tensors * sectors + extra + 16 * ROWS
        if not extra:  # the row is split over the programs: none of it is read twice, edges aside
            assert launch.traffic.load_sectors <= 1.02 * launch.traffic.load_once + 64 * ROWS


def test_infinities_and_nan_cross_programs() -> None:
    N = 128256
    x = torch.randn(4, N).to(torch.bfloat16)
    x[0] = -math.inf
    x[1, -1] = math.nan
    x[2, 0] = math.inf
    with device(90) as gpu, ContractMode():
        fused_softmax(x)
    assert gpu.launches[0].compiled.metadata.num_ctas == 8


def test_every_barrier_of_the_cluster_is_needed() -> None:
    """Without any one of them the machine finds what is no longer ordered."""
    x = torch.randn(1, 131072)
    with device(90) as gpu:
        fused_softmax(x)
    waits = gpu.launches[0].compiled.asm["ptx"].count("barrier.cluster.wait.aligned;")
    assert waits >= 3

    def without(i: int) -> Callable[[str], str]:
        def change(ptx: str) -> str:
            parts = ptx.split("barrier.cluster.wait.aligned;")
            return (
                "barrier.cluster.wait.aligned;".join(parts[:i])
                + "bar.sync 0;"
                + "barrier.cluster.wait.aligned;".join(parts[i:])
            )

        return change

    for i in range(1, waits + 1):
        with pytest.raises(MemoryFaultError, match=r"nothing orders the two|may have ended"), altered(without(i)), device(90):
            fused_softmax(x)
