"""The hardware's limits, which every later row is held to. First, by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .record import Recorder, rates, spread
from .roofline import COPY_BYTES, MATRIX_N, copy_samples, matmul_dtypes, matmul_samples
from .tasks import dtype_name
from .timing import DeviceClock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLOCK = DeviceClock()


@pytest.mark.benchmark(group="roofline", timer=CLOCK)
def test_copy(benchmark: Any, recorder: Recorder) -> None:
    samples = copy_samples()
    _report(benchmark, recorder, samples, "copy", "int32", 2 * COPY_BYTES, 0)


@pytest.mark.benchmark(group="roofline", timer=CLOCK)
@pytest.mark.parametrize("dtype", matmul_dtypes() if torch.cuda.is_available() else [torch.bfloat16], ids=dtype_name)
def test_matmul(benchmark: Any, recorder: Recorder, dtype: torch.dtype) -> None:
    moved = 3 * MATRIX_N**2 * dtype.itemsize
    _report(benchmark, recorder, matmul_samples(dtype), dtype_name(dtype), dtype_name(dtype), moved, 2 * MATRIX_N**3)


def _report(benchmark: Any, recorder: Recorder, samples: list[float], case: str, dtype: str, moved: int, flops: int) -> None:
    remaining = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(samples))
    row = spread(samples)
    row |= rates(float(row["p50_us"]) * 1e-6, moved, flops, None)
    shape = str(MATRIX_N) if flops else str(COPY_BYTES)
    recorder.add(op="roofline", case=case, dtype=dtype, kind="roofline", provider="torch", role="peer", shape=shape,
                 status="ok", method="graph", l2="cold", **{"pass": "fwd"}, **row)  # fmt: skip
