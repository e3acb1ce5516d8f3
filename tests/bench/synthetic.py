"""A made-up results file, to test the report and the comparison with. Its machine is named SYNTHETIC: it is no measurement."""

from __future__ import annotations

import math
from pathlib import Path

from bench.record import COLUMNS, annotate, write
from bench.roofline import Roofline
from bench.tasks import Task, matrix

SPEED = {"ours": 0.93, "eager": 0.6, "compile": 0.85, "liger": 0.8, "quack": 0.9, "cublaslt": 0.88}  # share of the limit
BASE = {
    "gpu": "SYNTHETIC GPU",
    "driver": "0",
    "cpu": "SYNTHETIC CPU",
    "torch": "0",
    "triton": "0",
    "commit": "0",
    "time": "2000-01-01",
}
ROOF = Roofline(3e12, {"bf16": 8e14, "fp16": 8e14, "fp32": 5e13})


def _row(**values: object) -> dict[str, object]:
    return {**dict.fromkeys(COLUMNS, ""), **BASE, "status": "ok", **values}


def _measured(task: Task, provider: str, share: float, slowdown: float) -> dict[str, object]:
    moved, flops = task.work()
    overhead = 2e-6 if task.kind == "kernel" else 2e-5
    seconds = (ROOF.limit(moved, flops, task) / share + overhead) * (slowdown if provider == "ours" else 1.0)
    shape = "x".join(str(s) for s in task.case.shape)
    return _row(
        **task.key, provider=provider, role="ours" if provider == "ours" else "peer", shape=shape, samples=20,
        p20_us=seconds * 0.99e6, p50_us=seconds * 1e6, p80_us=seconds * 1.02e6, bytes=moved, flops=flops,
        gbps=moved / seconds / 1e9, tflops=flops / seconds / 1e12,
        percent_of_limit=100 * ROOF.limit(moved, flops, task) / seconds, error=1e-3, method="graph",
    )  # fmt: skip


def write_synthetic(path: Path, only: str = "bf16", slowdown: float = 1.0) -> Path:
    """Rows for every task that matches only. slowdown: multiplies the times of ours."""
    rows = [_row(op="roofline", case="copy", dtype="int32", kind="roofline", provider="torch", role="peer", p50_us=1.0, gbps=3000, shape="1",
                 **{"pass": "fwd"})]  # fmt: skip
    rows += [_row(op="roofline", case=d, dtype=d, kind="roofline", provider="torch", role="peer", p50_us=1.0, tflops=r / 1e12, shape="1",
                  **{"pass": "fwd"}) for d, r in ROOF.rates.items()]  # fmt: skip
    for i, (task, provider) in enumerate(matrix(only, list(SPEED))):
        if provider == "cublaslt" and task.spec.name != "linear":
            continue
        rows.append(_measured(task, provider, SPEED[provider] * (1 + 0.05 * math.sin(i)), slowdown))
    rows.append(_row(provider="helion", role="peer", status="absent", reason="helion is not installed"))
    rows.append(_row(op="softmax", case="4k", dtype="bf16", kind="kernel", provider="flag-gems", role="peer", status="wrong",
                     reason="result 0 of 1 (fwd): relative error 0.5, allowed 0.04", **{"pass": "fwd"}))  # fmt: skip
    write(path, annotate(rows))
    return path
