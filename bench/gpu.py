"""The steps of bench/gpu.sh. Each runs in its own process with a time limit; the summary is rewritten after each."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .environment import ROOT, alone, environment
from .test_3_matrix import CONTEXT_LOST

REPORT_S = 25.0  # kept back for drawing the report
GRACE_S = 20.0  # between the moment that measuring stops and the step's limit, to finish a measurement and write files


@dataclass(frozen=True)
class Step:
    """One step of a GPU run.

    limit_s: the most seconds it may take. measures: the step runs a bench file, which gets the CSV, the JSON and a budget.
    needs: a program without which the step is skipped.
    """

    name: str
    what: str
    command: tuple[str, ...]
    limit_s: float
    measures: bool = False
    needs: str = ""


PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") else ()  # most of the time goes into compiling kernels
KEEP_GOING = (sys.executable, "-m", "pytest", "-q", "--maxfail=40", "--tb=short")
BENCH = (sys.executable, "-m", "pytest", "-q", "--tb=short", "--benchmark-columns=median,iqr,rounds")
SANITIZE = ("compute-sanitizer", "--target-processes", "application-only", "--error-exitcode", "86", "--print-limit", "20")
RUN_SUBSET = (sys.executable, "-m", "bench.sanitize")
MATRIX = "matrix"
STEPS = (
    Step("variants", "long and odd rows first: kernels that nothing but a GPU can run", (*KEEP_GOING, *PARALLEL, "tests/gpu/test_1_variants.py"), 50),
    Step("correctness", "every op, forward and backward, every dtype, held to the contract",
         (*KEEP_GOING, *PARALLEL, "tests/gpu", "--ignore=tests/gpu/test_1_variants.py", "--ignore=tests/gpu/test_2_inlining.py",
          "--ignore=tests/gpu/test_3_graphs.py"), 90),
    Step("memcheck", "out-of-bounds and misaligned accesses on a subset", (*SANITIZE, "--tool", "memcheck", *RUN_SUBSET), 45, needs="compute-sanitizer"),
    Step("racecheck", "shared-memory races on a subset", (*SANITIZE, "--tool", "racecheck", *RUN_SUBSET), 35, needs="compute-sanitizer"),
    Step("inlining", "kernels inlined by wrap_triton; an AOTInductor package in a process without fused_ops", (*KEEP_GOING, *PARALLEL, "tests/gpu/test_2_inlining.py"), 55),
    Step("graphs", "CUDA graphs: capture, new inputs, replay", (*KEEP_GOING, "tests/gpu/test_3_graphs.py"), 30),
    Step("roofline", "copy bandwidth and matrix rates", (*BENCH, "bench/test_1_roofline.py"), 30, measures=True),
    Step("host", "host time of a call", (*BENCH, "bench/test_2_host.py"), 30, measures=True),
    Step(MATRIX, "every op, case, pass and provider, in priority order", (*BENCH, "bench/test_3_matrix.py"), 0, measures=True),
    Step("models", "MiniLM, a GPT-2 block and a ViT block: inference and a training step", (*BENCH, "bench/test_4_models.py"), 75, measures=True),
    Step("tensorrt", "tensorrt probe: build an engine with TensorRT for RTX, and run it", (sys.executable, "-m", "bench.tensorrt_probe"), 30),
)  # fmt: skip
AFTER_MATRIX = ("models", "tensorrt")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default 570)")
    parser.add_argument("--only", default="", help="regular expression on a measurement's id, such as softmax-4k-bf16-fwd")
    parser.add_argument("--steps", default="", help="comma-separated: " + ",".join(s.name for s in STEPS))
    parser.add_argument(
        "--resume", nargs="?", const="", default=None, metavar="CSV", help="keep what OUT/results.csv or CSV holds"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    args = parser.parse_args(argv)
    names = [s.name for s in STEPS]
    args.chosen = [n for n in args.steps.split(",") if n] or names
    if unknown := set(args.chosen) - set(names):
        parser.error(f"--steps: got {', '.join(sorted(unknown))}, allowed: {', '.join(names)}")
    if args.resume and not Path(args.resume).is_file():
        parser.error(f"--resume: no file {args.resume}")
    return args


class Run:
    """One run: the time left, the files under out, and the summary so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.deadline = time.monotonic() + args.budget
        self.lines: list[str] = []
        self.failed = False
        self.parts = Path(tempfile.mkdtemp(prefix="bench-gpu-"))

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def limit(self, step: Step) -> float:
        """Seconds this step may take now: its own limit, or for the matrix all but what later steps and the report need."""
        later = sum(s.limit_s for s in STEPS if s.name in AFTER_MATRIX and s.name in self.args.chosen)
        if step.name == MATRIX:
            return self.left() - later - REPORT_S
        return min(step.limit_s, self.left() - (0 if step.name in AFTER_MATRIX else REPORT_S))

    def command(self, step: Step, limit: float, crashed: bool = False) -> list[str]:
        command = list(step.command)
        if step.measures:
            json_file = self.parts / f"{step.name}{len(list(self.parts.glob('*.json')))}.json"
            command += [f"--bench-csv={self.out / 'results.csv'}", f"--benchmark-json={json_file}"]
            command += [f"--bench-budget={max(limit - GRACE_S, 5):.0f}"]
            command += [f"--bench-only={self.args.only}"] if self.args.only and step.name in (MATRIX, "models") else []
            command += ["--bench-resume"] if self.args.resume is not None or crashed else []
            command += ["--bench-after-crash"] if crashed else []
        return command

    def do(self, step: Step) -> None:
        started, crashed = time.monotonic(), False
        while True:
            limit = self.limit(step)
            if step.needs and shutil.which(step.needs) is None:
                return self.tell(step, f"skipped: no {step.needs} here", 0)
            if limit < 8:
                return self.tell(step, "skipped: the budget is spent", 0)
            status, tail = execute(self.command(step, limit, crashed), limit, self.out / "log.txt", step.name)
            if status != CONTEXT_LOST or step.name != MATRIX:
                break
            crashed = True  # the measurement that lost the context is in the CSV as an error; go on after it
        good = status == 0 or (status == 5 and step.measures)  # 5: pytest had nothing to run
        verdict = "ok" if good else "stopped at its limit" if status == 124 else f"FAILED (status {status})"
        self.failed |= not good and status != 124
        self.tell(step, f"{verdict}: {tail}", time.monotonic() - started)

    def tell(self, step: Step, said: str, seconds: float) -> None:
        self.lines.append(f"| {step.name} | {seconds:.0f} s | {said.replace('|', '/')} |")
        print(f"[{self.left():5.0f} s left] {step.name}: {said}", flush=True)
        self.write()

    def write(self) -> None:
        """summary.md and benchmark.json as they stand."""
        machine = "\n".join(f"- {k}: {v}" for k, v in environment().items() if v)
        table = "\n".join(["| step | time | result |", "|---|---|---|", *self.lines])
        (self.out / "summary.md").write_text(f"# GPU run\n\n{machine}\n\n{table}\n")
        merge_json(sorted(self.parts.glob("*.json")), self.out / "benchmark.json")

    def report(self) -> None:
        results = self.out / "results.csv"
        if results.exists():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "bench", "report", str(results), "--out", folder]
                status, tail = execute(command, max(self.left(), 10), self.out / "log.txt", "report")
                if status == 0:
                    shutil.copyfile(Path(folder) / "report.html", self.out / "report.html")
            self.lines.append(f"| report | | {tail} |")
            self.write()


def execute(command: list[str], limit: float, log: Path, name: str) -> tuple[int, str]:
    """Run with all output appended to log. Returns (status, the last line); 124 when the limit stopped it."""
    with log.open("ab") as file:
        file.write(f"\n===== {name}: {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=alone(), start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            status = 124
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return status, lines[-1][:200] if lines else ""


def merge_json(parts: list[Path], target: Path) -> None:
    """One pytest-benchmark file from those of the steps."""
    whole: dict[str, object] = {}
    benchmarks: list[object] = []
    for part in parts:
        if part.stat().st_size:
            content = json.loads(part.read_text())
            benchmarks += content.pop("benchmarks")
            whole = content
    if whole:
        target.write_text(json.dumps({**whole, "benchmarks": benchmarks}))


def plan(run: Run) -> None:
    """Print every step with its limit and command, and the head of the matrix."""
    from .providers import PROVIDERS
    from .tasks import matrix

    print(f"Would run within {run.args.budget:.0f} s, into {run.out}:")
    for step in STEPS:
        if step.name in run.args.chosen:
            limit = run.limit(step)
            absent = f"  [skipped here: no {step.needs}]" if step.needs and shutil.which(step.needs) is None else ""
            share = "all that is left" if step.name == MATRIX else f"at most {step.limit_s:.0f} s"
            print(f"  {step.name:<12} {share:<16} {step.what}{absent}\n{'':15}{' '.join(run.command(step, limit))}")
    print("Providers:")
    for provider in PROVIDERS:
        print(f"  {provider.name:<22} {provider.available('cuda') or 'available'}")
    tasks = matrix(run.args.only, [p.name for p in PROVIDERS])
    print(f"Matrix: {len(tasks)} measurements in this order (providers that are absent left out at run time):")
    for task, provider in tasks[: len(PROVIDERS)]:
        print(f"  {task.id}-{provider}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    run = Run(args)
    try:
        if args.dry_run:
            plan(run)
            return 0
        import torch

        if not torch.cuda.is_available():
            print("bench/gpu.sh: no CUDA device: nothing was run; --dry-run says what would", file=sys.stderr)
            return 2
        results = args.out / "results.csv"
        if args.resume is None:
            results.unlink(missing_ok=True)
        elif args.resume and Path(args.resume).resolve() != results.resolve():
            shutil.copyfile(args.resume, results)
        (args.out / "log.txt").unlink(missing_ok=True)
        for step in STEPS:
            if step.name in args.chosen:
                run.do(step)
        run.report()
        print((args.out / "summary.md").read_text())
        return int(run.failed)
    finally:
        shutil.rmtree(run.parts, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
