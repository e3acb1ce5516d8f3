"""A made-up results file, to test the report and the comparison with. Its machine is named SYNTHETIC: it is no measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import COLUMNS, annotate, read, write
from bench.results_format import FORMAT, pack
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
ONE = {"samples": 1, "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0}
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
    rows = [_row(op="roofline", case="copy", dtype="int32", kind="roofline", provider="torch", role="peer", **ONE, gbps=3000, shape="1",
                 **{"pass": "fwd"})]  # fmt: skip
    rows += [_row(op="roofline", case=d, dtype=d, kind="roofline", provider="torch", role="peer", **ONE, tflops=r / 1e12, shape="1",
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


H100 = "NVIDIA H100 80GB HBM3"
MACHINE = {
    "format": FORMAT, "gpu": H100, "capability": "9.0", "driver": "0.1", "cuda": "13.0", "python": "3.12.1", "torch": "2.11.0",
    "triton": "3.6.0", "commit": "abc1234", "call": "first", "budget_s": 300.0, "started": "2000-01-01T00:00:00+00:00",
    "ended": "2000-01-01T00:05:00+00:00", "steps": [{"name": "probe", "status": "ok", "seconds": 1.5, "said": "all | well"}],
}  # fmt: skip


def write_run(
    out: Path, only: str = "softmax-4k-bf16", slowdown: float = 1.0, change: Callable[[dict[str, str]], None] = lambda _: None,
    tuned: dict[str, Any] | None = None, **machine: Any,
) -> Path:  # fmt: skip
    """A made-up run of bench/gpu.sh in the folder out, packed. machine: other values for MACHINE; change: done to every row.

    The GPU has a real name, since its folder follows from it, and the CPU is named SYNTHETIC.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = MACHINE | machine
    rows = read(write_synthetic(out / "results.csv", only, slowdown))
    for row in rows:
        row.update({k: record[k] for k in ("gpu", "torch", "triton", "commit")} | {"time": record["started"]})
        change(row)
    write(out / "results.csv", rows)
    (out / "machine.json").write_text(json.dumps(record))
    (out / "correctness.csv").write_text(
        "test,outcome,seconds,worker,kernel,message\n"
        "tests/gpu/a.py::test_a[1],passed,0.5,gw0,,\n"
        'tests/gpu/a.py::test_b[2],failed,0.5,gw1,softmax_fwd_kernel,"it | broke\nhere"\n'
    )
    benchmark = {
        "machine_info": {"node": "secret-host", "gpu": H100},
        "benchmarks": [{"name": "a", "stats": {"median": 1.0, "data": [1.0]}}],
    }
    (out / "benchmark.json").write_text(json.dumps(benchmark))
    (out / "summary.md").write_text("# GPU run\n")
    (out / "inductor.jsonl").write_text(json.dumps({"file": "a.py", "source": "x = 1"}) + "\n")
    (out / "log.txt").write_text("a line\n")
    if tuned is not None:
        (out / "tuned.json").write_text(json.dumps(tuned))
    pack(out)
    return out
