"""The hardware's limits, which every other row is held to. A run measures them at its start and again at its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import roofline
from .record import Recorder, rates, spread
from .timing import DeviceClock, Replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLOCK = DeviceClock()


@pytest.mark.benchmark(group="roofline", timer=CLOCK)
def test_copy(benchmark: Any, recorder: Recorder) -> None:
    _report(benchmark, recorder, roofline.copy_replay(), "copy", roofline.COPY_BYTES, 2 * roofline.COPY_BYTES, 0)


@pytest.mark.benchmark(group="roofline", timer=CLOCK)
@pytest.mark.parametrize("case", roofline.matmul_cases() if torch.cuda.is_available() else ["bf16"])
def test_matmul(benchmark: Any, recorder: Recorder, case: str) -> None:
    n = roofline.matmul_size(case)
    itemsize, output = (1, 2) if case.startswith("float8") else (4, 4) if case == "fp32" else (2, 2)
    _report(benchmark, recorder, roofline.matmul_replay(case), case, n, n * n * (2 * itemsize + output), 2 * n**3)


def _report(benchmark: Any, recorder: Recorder, replay: Replay, case: str, size: int, moved: int, flops: int) -> None:
    samples = replay.series(roofline.SAMPLES, roofline.SPIN_S)
    remaining = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(samples))
    row = spread(samples)
    row |= rates(float(row["p50_us"]) * 1e-6, moved, flops, None)
    recorder.add(op="roofline", case=case, dtype=case if flops else "int32", kind="roofline", provider="torch", role="peer",
                 shape=str(size), status="ok", method=replay.method, l2="cold", **{"pass": "fwd"}, **row)  # fmt: skip
