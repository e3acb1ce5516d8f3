"""What compute-sanitizer is given on a GPU, found out here without running a kernel: its calls reach every kernel family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench import sanitize
from fused_ops import REGISTRY
from fused_ops._runtime import clusters
from fused_ops.kernels.config import CLUSTER_TRITON
from fused_ops.testing import recorded

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture(scope="module")
def launched() -> set[str]:
    """The kernels that the subset launches, with configurations for sm_90 and the newest Triton; none is run."""
    with pytest.MonkeyPatch.context() as patch, recorded() as launches:
        patch.setattr(clusters, "_triton", lambda: CLUSTER_TRITON)
        calls = sanitize.run("cpu", (torch.bfloat16, torch.float32))
    assert 2 * len(REGISTRY) < calls <= 2 * 8 * len(REGISTRY)  # it is slow there
    return {kernel.fn.__name__ for kernel, _, _ in launches}


def _families() -> dict[str, set[str]]:
    """Kernel file -> the kernels in it."""
    files = {
        path.stem: set(re.findall(r"^def ([a-z]\w*_kernel)\(", path.read_text(), re.MULTILINE))
        for path in KERNELS.rglob("*.py")
    }
    return {name: kernels for name, kernels in files.items() if kernels}


def test_every_family_of_kernels_is_watched(launched: set[str]) -> None:
    families = _families()
    assert len(families) >= 10
    in_gluon = {name for name in families if name.endswith("_shared")}  # which no interpreter runs
    assert {name for name, kernels in families.items() if not kernels & launched} == in_gluon


def test_every_matmul_kernel_is_watched(launched: set[str]) -> None:
    """TMA, split K and pointers; forward, backward and the gated ones."""
    kernels = set().union(*(kernels for name, kernels in _families().items() if name.startswith("linear")))
    assert len(kernels) >= 11
    assert not kernels - launched


@pytest.mark.parametrize("name", list(REGISTRY))
def test_no_op_is_left_out(name: str) -> None:
    spec = REGISTRY[name]
    samples = list(sanitize.subset(spec, "cpu", torch.bfloat16))
    assert len({s.name for s in samples}) == len(samples) >= 3
