"""The hardware's limits, measured in the same run: the copy bandwidth and the matrix rates that everything is held to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from fused_ops._torch.spec import REGISTRY

from .tasks import Task
from .timing import Replay

COPY_BYTES = 2 << 30  # read, and as many written
MATRIX_N = 8192
FP32_N = 4096  # without TF32 a product is long as it is
SAMPLES = 100
SPIN_S = 0.5  # of other work before each series
DRIFT = 0.03  # more than this between the first and the last measurement of a run is said
FP8 = torch.float8_e4m3fn


@dataclass
class Roofline:
    """bandwidth in bytes/s (read + written by a large device copy); rates: dtype name -> FLOP/s of a large cuBLAS product."""

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], gpu: str, time: str | None = None) -> Roofline | None:
        """The limits of a GPU as the rows of a results file have them; None where its copy bandwidth was not measured.

        gpu: the column of that name. time: an ISO time; of several measurements the nearest to it counts, or the last.
        """
        nearest: dict[str, Mapping[str, Any]] = {}
        for row in _measured(rows):
            if row["gpu"] == gpu:
                known = nearest.get(row["case"])
                if known is None or _apart(row, time) <= _apart(known, time):
                    nearest[row["case"]] = row
        if "copy" not in nearest:
            return None
        return cls(_rate(nearest.pop("copy")), {case: _rate(row) for case, row in nearest.items()})

    def limit(self, moved: int, flops: int, task: Task) -> float:
        """Seconds that no implementation beats by much: the larger of the fewest bytes' and the FLOPs' time.

        The FLOPs of ops that are no matrix products do not run on tensor cores and hide behind memory: left out.
        """
        return self.least_seconds(moved, flops, task.key["op"], task.key["dtype"])

    def least_seconds(self, moved: float, flops: float, op: str, dtype: str) -> float:
        """The same from a row's columns."""
        known = REGISTRY.get(op)
        rate = self.rates.get(dtype) if known is not None and known.roles.multiplies else None
        return max(moved / self.bandwidth, flops / rate if rate else 0.0)


def _measured(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (row for row in rows if row.get("kind") == "roofline" and row.get("status") == "ok")


def _rate(row: Mapping[str, Any]) -> float:
    """bytes/s of the copy, else FLOP/s."""
    return float(row["gbps"]) * 1e9 if row["case"] == "copy" else float(row["tflops"]) * 1e12


def _seconds(time: str) -> float:
    """An ISO time as seconds since 1970; 0 for a text that is none."""
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _apart(row: Mapping[str, Any], time: str | None) -> float:
    """How far the row is from time, in seconds; without one, the later the nearer."""
    at = _seconds(str(row.get("time", "")))
    return -at if time is None else abs(at - _seconds(time))


def drift(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each limit whose first and last measurement on a GPU differ by more than DRIFT."""
    series: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in _measured(rows):
        series.setdefault((row["gpu"], row["case"]), []).append(row)
    said = []
    for (gpu, case), found in series.items():
        found.sort(key=lambda row: _seconds(str(row.get("time", ""))))
        first, last = found[0], found[-1]
        change = _rate(last) / _rate(first) - 1
        if abs(change) > DRIFT:
            scale, unit = (1e9, "GB/s") if case == "copy" else (1e12, "TFLOP/s")
            said.append(
                f"{gpu}: {case} drifted by {change:+.1%}, from {_rate(first) / scale:.4g} {unit} at {first['time']} "
                f"to {_rate(last) / scale:.4g} {unit} at {last['time']}"
            )
    return said


def copy_replay() -> Replay:
    """One device-to-device copy of COPY_BYTES random bytes, by a kernel: in a graph, a memory copy takes the slower copy engine."""
    source = torch.randint(0, 2**31 - 1, (COPY_BYTES // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return Replay([lambda: (torch.neg(source, out=target),)])


def matmul_cases() -> list[str]:
    """The products whose rate can be measured on this GPU, the ones that matter most first: dtypes by their names.

    The rate of fp8 is that of one scale for each operand; "float8_e4m3fn_rows" has one for each row and column.
    """
    fp8 = ["float8_e4m3fn"] if torch.cuda.get_device_capability() >= (8, 9) else []
    rows = ["float8_e4m3fn_rows"] if torch.cuda.get_device_capability() >= (9, 0) else []
    return ["bf16", *fp8, "fp16", "fp32", *rows]


def matmul_size(case: str) -> int:
    """n of the (n, n) x (n, n) product."""
    return FP32_N if case == "fp32" else MATRIX_N


def matmul_replay(case: str) -> Replay:
    """One (n, n) x (n, n) product of normal random numbers. float8 by torch._scaled_mm: K-major, bf16 out, fast accumulation."""
    n = matmul_size(case)
    a, b = torch.randn(2, n, n, device="cuda")
    if case.startswith("float8"):
        by_row = case.endswith("_rows")
        (qa, a_scale), (qb, b_scale) = _quantised(a, by_row), _quantised(b, by_row)

        def product() -> tuple[Tensor, ...]:
            return (torch._scaled_mm(qa, qb.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True),)

        return Replay([product])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case]
    x, y = a.to(dtype), b.to(dtype)
    return Replay([lambda: (x @ y,)])


def _quantised(x: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """(x / scale as e4m3, scale), where scale brings the largest magnitude, of each row or of all, to e4m3's largest number."""
    largest = x.abs().amax(-1, keepdim=True) if by_row else x.abs().max()
    scale = largest / torch.finfo(FP8).max
    return (x / scale).to(FP8), scale
