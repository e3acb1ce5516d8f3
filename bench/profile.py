"""The calls that `ncu` counts: the kernels of the first headline rows, forward and backward, each launched once.

python -m bench.profile [calls]. With no argument it runs ncu over itself. The counters say what a time does not: the bytes that DRAM really moved, and how busy memory, issue slots and tensor cores were.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from .environment import ROOT
from .headline import headline_tasks
from .inputs import argument_sets
from .measure import step_of
from .sanitize import kernels
from .tasks import Task

METRICS = (
    "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed", "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.sum", "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread", "launch__occupancy_limit_registers", "launch__occupancy_limit_shared_mem",
    "launch__waves_per_multiprocessor",
)  # fmt: skip
MOST = 14


def profiler() -> str | None:
    """Where ncu is."""
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")


def command(program: str) -> list[str]:
    """ncu's command line over the calls of this module."""
    ours = "regex:^(" + "|".join(kernels()) + ")$"
    return [
        program, "--clock-control", "none", "--target-processes", "application-only", "--kernel-name", ours, "--csv",
        "--print-units", "base", "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.profile", "calls",
    ]  # fmt: skip


def tasks() -> list[Task]:
    """The first MOST headline tasks of kernel time that run forward or backward alone."""
    return [t for t in headline_tasks() if t.kind == "kernel" and t.pass_ in ("fwd", "bwd")][:MOST]


def calls() -> int:
    """Make each task's call once. Returns how many."""
    found = tasks()
    for task in found:
        (arguments,) = argument_sets(task, 1, "cuda")
        step_of(task, task.spec.public, arguments)()
        torch.cuda.synchronize()
        print(f"call: {task.id}", flush=True)
    return len(found)


def main(argv: list[str]) -> int:
    if not torch.cuda.is_available():
        print("bench.profile: needs a CUDA device")
        return 2
    if argv == ["calls"]:
        print(f"profile: {calls()} rows")
        return 0
    program = profiler()
    if program is None:
        print("bench.profile: not run: ncu is not here")
        return 2
    return subprocess.run(command(program), cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
