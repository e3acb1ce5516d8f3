"""compute-sanitizer over our kernels: every op and family of them, on the sample inputs that stress addressing.

python -m bench.sanitize memcheck | racecheck | initcheck | synccheck

Only our own kernels are instrumented, by their names. The calls run in the order of what they can find, so a run that is cut
short has made the most useful ones; the last line says how many were made and how many errors were found.
Exit status: 0 when none was found, 1 when some were or the calls broke off, 2 when nothing could be run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ops._torch.spec import REGISTRY, Op, Sample
from fused_ops.kernels.config import SHARED_COLUMNS

from .environment import ROOT, alone

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CALLED = re.compile(r"^call (\d+): ", re.MULTILINE)
FOUND = re.compile(r"(?:ERROR SUMMARY: |SUMMARY: )(\d+) (?:error|hazard)")
# Torch's pool of memory would hide an access beyond a tensor's end. The variable is read when CUDA is first used.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def subset(spec: Op, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples that stress addressing, and rows of a length that no sample has.

    The last of an op's samples come first: they are the longest rows, the views, what TMA descriptors and parts of K are for.
    """
    yield from reversed([sample for sample in spec.samples(device, dtype) if "addressing" in sample.tags])
    if spec.tuned is not None and spec.tuned.clustered and dtype is torch.float32:  # a cluster's, where they run
        yield Sample("cluster", *spec.bench.make(device, (1, 65536), dtype, None))
    if spec.tuned is not None and "packed" in spec.tuned.variants:
        yield Sample("packed", *spec.bench.make(device, (2, 32768), dtype, None))  # forward and backward keep pairs
    for raw in spec.raw:
        if raw.name in SHARED_COLUMNS and dtype is not torch.float32:
            yield Sample(f"shared {raw.name}", *spec.bench.make(device, (2, SHARED_COLUMNS[raw.name][1]), dtype, None))


def calls(device: str, dtypes: tuple[torch.dtype, ...]) -> list[tuple[Op, Sample, str]]:
    """(op, sample, label) of every call: all ops take turns, each with what stresses addressing most first, dtype by dtype."""
    ordered = []
    for d, dtype in enumerate(dtypes):
        for o, spec in enumerate(REGISTRY.values()):
            ordered += [((d, i, o), (spec, s, str(dtype)[6:])) for i, s in enumerate(subset(spec, device, dtype))]
    return [call for _, call in sorted(ordered, key=lambda pair: pair[0])]


def run(device: str, dtypes: tuple[torch.dtype, ...]) -> int:
    """Make the calls, with a line before each. Returns their number."""
    made = 0
    for spec, sample, label in calls(device, dtypes):
        made += 1
        print(f"call {made}: {spec.name} {sample.name} {label}", flush=True)
        args = [_leaf(a) for a in sample.args] if spec.trains else sample.args
        out = spec.public(*args, **sample.kwargs)
        first = out if isinstance(out, Tensor) else out[0]
        if first.requires_grad:
            first.backward(torch.randn_like(first))
        if device == "cuda":
            torch.cuda.synchronize()
    return made


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def kernels() -> list[str]:
    """The names of our kernels."""
    sources = [path.read_text() for path in sorted((ROOT / "kernels").rglob("*.py"))]
    return sorted({name for source in sources for name in re.findall(r"^def ([a-z]\w*_kernel)\(", source, re.MULTILINE)})


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    folders = [Path(os.environ.get(name, "")) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("compute-sanitizer", path=str(folder)) for folder in (*folders, "/usr/local/cuda/bin")]
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


def command(tool: str) -> list[str]:
    """What runs a tool over the calls: a step of bench/plans.py."""
    return [sys.executable, "-m", "bench.sanitize", tool]


def attempts(program: str, tool: str) -> Iterator[list[str]]:
    """compute-sanitizer's command: with our kernels only, then, should it refuse those options, with every kernel."""
    base = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "86", "--print-limit", "20"]
    child = [sys.executable, "-m", "bench.sanitize", "calls"]
    names = [word for name in kernels() for word in ("--kernel-name", f"kernel_substring={name}")]
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    yield [*base, *quiet, *names, *child]
    yield [*base, *names, *child]
    yield [*base, *child]


class StoppedError(Exception):
    """SIGTERM came."""


def stop(*_: object) -> None:
    raise StoppedError


def watch(tool: str, program: str) -> int:
    """Run the tool, its output passed on; then a line that sums it up."""
    signal.signal(signal.SIGTERM, stop)
    said, status, ended = "", 2, "ended"
    for attempt, words in enumerate(attempts(program, tool)):
        said, process = "", None
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env={**alone(), **UNCACHED}, text=True, errors="replace", stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                print(line, end="", flush=True)
            status = process.wait()
        except (StoppedError, KeyboardInterrupt):
            ended, status = "stopped", 0
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if ended == "stopped" else stop)
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the tool, and what it watches
        if ended == "stopped" or CALLED.search(said):
            break
        print(f"{tool}: attempt {attempt + 1} made no call (exit status {status})", flush=True)
    line, bad = summary(tool, said, status, ended)
    print(line, flush=True)
    return bad


def summary(tool: str, said: str, status: int, ended: str) -> tuple[str, int]:
    """(the last line, the exit status). said: all that the tool printed."""
    made = [int(number) for number in CALLED.findall(said)]
    done = said.rstrip().endswith("calls done") or "calls done\n" in said
    if not made:
        return f"{tool}: no call was made (exit status {status})", 2
    totals = [int(number) for number in FOUND.findall(said)]
    blocks = len(re.findall(r"^========= (?:Invalid|Error: |Misaligned|Uninitialized|Barrier)", said, re.MULTILINE))
    errors = totals[-1] if totals else blocks
    named = sorted({name for name in re.findall(r"\b\w+_kernel\b", "\n".join(_reports(said))) if name in kernels()})
    parts = [f"{len(made)} calls", f"{errors} error{'s' * (errors != 1)}" + (f" in {', '.join(named)}" if named else "")]
    if not done:
        last = said[[m.start() for m in CALLED.finditer(said)][-1] :].splitlines()[0]
        parts.append(f"{ended} in {last}")
    wrong = errors > 0 or (ended != "stopped" and (status != 0 or not done))
    parts += [f"exit status {status}"] if wrong else []
    return f"{tool}: {', '.join(parts)}", int(wrong)


def _reports(said: str) -> list[str]:
    """The tool's own lines."""
    return [line for line in said.splitlines() if line.startswith("=========")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("tool", choices=(*TOOLS, "calls"), help="or calls: only make the calls, in this process")
    tool = parser.parse_args(argv).tool
    if not torch.cuda.is_available():
        print(f"bench.sanitize: {tool}: no CUDA device: nothing was run")
        return 2
    if tool == "calls":
        print(f"{run('cuda', (torch.bfloat16, torch.float32))} calls done", flush=True)
        return 0
    program = sanitizer()
    if program is None:
        print(f"{tool}: not run: compute-sanitizer is not here")
        return 2
    return watch(tool, program)


if __name__ == "__main__":
    sys.exit(main())
