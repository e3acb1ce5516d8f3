"""Every op, those for inference too, on the GPU: its samples in every dtype, and its benchmark cases at their real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_ops._torch.spec import FORWARD_ONLY, REGISTRY, Case
from tests.gpu.hold import DTYPE_IDS, DTYPES, hold

pytestmark = pytest.mark.gpu
OPS = REGISTRY | FORWARD_ONLY
MOST_ELEMENTS = 1 << 25  # of a row op's input: its fp64 reference takes eight times the bytes, several times over
MOST_FLOPS = 3e11


def sample_cases() -> list[Any]:
    return [
        pytest.param(name, dtype, i, id=f"{name}-{label}-{sample.name}")
        for name, spec in OPS.items()
        for dtype, label in zip(DTYPES, DTYPE_IDS)
        for i, sample in enumerate(spec.samples("cpu", dtype))
    ]


@pytest.mark.parametrize(("name", "dtype", "index"), sample_cases())
def test_sample(name: str, dtype: torch.dtype, index: int) -> None:
    sample = list(OPS[name].samples("cpu", dtype))[index]
    hold(OPS[name], sample.args, sample.kwargs)


def bench_cases() -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}-{case.name}-{str(case.dtype)[6:]}")
        for name, spec in OPS.items()
        for case in spec.bench.cases()
        if case.dtype in (*DTYPES, torch.float8_e4m3fn)
        and max(spec.bench.bytes(case)) <= 6 * MOST_ELEMENTS * case.dtype.itemsize
        if spec.bench.flops(case)[0] <= MOST_FLOPS
    ]


@pytest.mark.parametrize(("name", "case"), bench_cases())
def test_bench_case(name: str, case: Case) -> None:
    """The sizes that are timed, with the configurations that timing uses; they are compiled here for the timing too."""
    args, kwargs = case.make("cuda")
    hold(OPS[name], args, kwargs)


@pytest.mark.parametrize("name", list(OPS))
def test_refusals(name: str) -> None:
    """A refused call raises before anything is launched: the device is as it was, and the next call works."""
    for sample in OPS[name].errors("cuda"):
        with pytest.raises(sample.raises, match=sample.match):
            OPS[name].public(*sample.args, **sample.kwargs)
    torch.cuda.synchronize()
