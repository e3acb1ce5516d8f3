"""Every op, those for inference too, on the GPU: its samples in every dtype, and its benchmark cases at their real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops.testing import Case, Op
from tests.gpu.hold import DTYPE_IDS, DTYPES, hold, memory_held

pytestmark = pytest.mark.gpu
MOST_ELEMENTS = 1 << 25  # of a row op's input: its fp64 reference takes eight times the bytes, several times over
MOST_FLOPS = 3e11
# What is larger is held to the contract on some of its rows, in test_4_large.py.


def sample_cases() -> list[Any]:
    return [
        pytest.param(name, dtype, i, id=f"{name}-{label}-{sample.name}")
        for name, spec in REGISTRY.items()
        for dtype, label in zip(DTYPES, DTYPE_IDS)
        for i, sample in enumerate(spec.samples("cpu", dtype))
    ]


@pytest.mark.parametrize(("name", "dtype", "index"), sample_cases())
def test_sample(name: str, dtype: torch.dtype, index: int) -> None:
    sample = list(REGISTRY[name].samples("cpu", dtype))[index]
    hold(REGISTRY[name], sample.args, sample.kwargs)


def bench_cases() -> list[Any]:
    return [
        pytest.param(
            name, case, id=f"{name}-{case.name}-{str(case.dtype)[6:]}", marks=pytest.mark.memory(memory_held(spec, case))
        )
        for name, spec in REGISTRY.items()
        for case in spec.bench.cases()
        if case.dtype in (*DTYPES, torch.float8_e4m3fn) and fits_whole(spec, case)
    ]


def fits_whole(spec: Op, case: Case) -> bool:
    """Whether every element of a benchmark case is compared."""
    elements = max(spec.bench.bytes(case)) // case.dtype.itemsize
    return elements <= 6 * MOST_ELEMENTS and spec.bench.flops(case)[0] <= MOST_FLOPS


@pytest.mark.parametrize(("name", "case"), bench_cases())
def test_bench_case(name: str, case: Case) -> None:
    """The sizes that are timed, with the configurations that timing uses; they are compiled here for the timing too."""
    args, kwargs = case.make("cuda")
    hold(REGISTRY[name], args, kwargs)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_refusals(name: str) -> None:
    """A refused call raises before anything is launched: the device is as it was, and the next call works."""
    for sample in REGISTRY[name].errors("cuda"):
        with pytest.raises(sample.raises, match=sample.match):
            REGISTRY[name].public(*sample.args, **sample.kwargs)
    torch.cuda.synchronize()
