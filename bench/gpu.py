"""Runs a plan of steps on a GPU within a budget of seconds. bench/gpu.sh calls it; bench/plans.py says what runs.

Each step is a process of its own with a time limit. The summary, machine.json and results.tar.gz are written again after each
step, and a measurement is flushed as it is made: a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .environment import ROOT, alone
from .failure import CONTEXT_LOST
from .files import read
from .inductor_sources import NAME, gather
from .plans import CLOSE_S, GRACE_S, PLANS, Plan, Step
from .results_format import machine_record, pack, write_machine, write_whole

NOTHING_TO_RUN = 5  # pytest's status when it selects no test


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--call", default="first", help=f"the plan: {', '.join(PLANS)} (default first)")
    parser.add_argument("--seconds", type=float, default=None, help="seconds for everything (default: the plan's)")
    parser.add_argument("--only", default="", help="regular expression on a measurement's id, such as softmax-4k-bf16-fwd")
    parser.add_argument("--steps", default="", help="comma-separated steps of the plan (default: all)")
    parser.add_argument("--again", default="", help="tests to run before anything else in the second plan, comma-separated")
    parser.add_argument("--resume", action="store_true", help="keep what OUT holds, and leave out what it has finished")
    parser.add_argument("--dry-run", action="store_true", help="say second by second what would run, and run nothing")
    args = parser.parse_args(argv)
    if args.call not in PLANS:
        parser.error(f"--call: got {args.call}, allowed: {', '.join(PLANS)}")
    args.plan = PLANS[args.call]
    names = [s.name for s in args.plan.steps]
    args.chosen = [n for n in args.steps.split(",") if n] or names
    if unknown := set(args.chosen) - set(names):
        parser.error(f"--steps: got {', '.join(sorted(unknown))}, allowed: {', '.join(names)}")
    args.seconds = args.plan.seconds if args.seconds is None else args.seconds
    if not args.seconds > 0:
        parser.error(f"--seconds: got {args.seconds:g}, allowed: more than 0")
    return args


Execute = Callable[[list[str], float, Path, str, dict[str, str]], tuple[int, str]]


class Run:
    """One run of a plan: the time left, the files under out, and what each step said.

    clock, execute: the time in seconds, and what runs a command; a test gives its own.
    """

    def __init__(
        self, args: argparse.Namespace, clock: Callable[[], float] = time.monotonic, execute: Execute | None = None
    ) -> None:
        self.args, self.out, self.clock = args, args.out, clock
        self.execute = globals()["execute"] if execute is None else execute
        self.plan: Plan = args.plan
        self.started, self.deadline = datetime.now(timezone.utc), clock() + args.seconds
        self.done: list[dict[str, Any]] = []
        self.failed = False
        self.parts = Path(tempfile.mkdtemp(prefix="bench-gpu-"))  # what the steps leave for one another
        self.inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or self.parts / "inductor")
        weakref.finalize(self, shutil.rmtree, self.parts, ignore_errors=True)

    def left(self) -> float:
        return self.deadline - self.clock()

    def steps(self) -> list[Step]:
        return [s for s in self.plan.steps if s.name in self.args.chosen]

    def limit(self, step: Step) -> float:
        """Seconds that a step may take now."""
        steps = self.steps()
        later = steps[steps.index(step) + 1 :]
        wanted = step.limit_s
        if step.grows:
            wanted = max(wanted, self.left() - CLOSE_S - sum(s.limit_s for s in later if not self.why_not(s)))
        return min(wanted, self.left() - CLOSE_S - sum(s.limit_s for s in later if s.kept))

    def why_not(self, step: Step) -> str:
        """Why a step is not run here; "" where it can be."""
        if step.needs == "{again}":
            return "" if self.args.again else "skipped: no test named by --again"
        if step.needs.endswith("/"):
            return "" if (ROOT / step.needs).is_dir() else f"skipped: no folder {step.needs}"
        return "" if not step.needs or _tool(step.needs) else f"skipped: no {step.needs} here"

    def command(self, step: Step, limit: float, crashed: bool = False) -> list[str]:
        words = {
            "out": str(self.out), "seconds": f"{max(limit - GRACE_S, 2):.0f}", "wheels": str(self.parts / "site"),
            "again": self.args.again,
        }  # fmt: skip
        command = [word.format(**words) for word in step.command if word != "{again}"]
        command += self.args.again.split(",") if "{again}" in step.command else []
        if step.measures:
            json_file = self.parts / f"{len(self.done):02}-{step.name}{'-again' * crashed}.json"
            command += [f"--bench-csv={self.out / 'results.csv'}", f"--benchmark-json={json_file}"]
            command += [f"--bench-until={time.time() + max(limit - GRACE_S, 2):.1f}"]
            command += [f"--bench-only={self.args.only}"] if self.args.only and step.grows else []
            command += ["--bench-resume"] if self.args.resume or crashed else []
            command += ["--bench-after-crash"] if crashed else []
        return command

    def environment(self) -> dict[str, str]:
        """os.environ for a step: the peers that were installed come after everything else on the path."""
        path = [p for p in (os.environ.get("PYTHONPATH", ""), str(self.parts / "site")) if p]
        own = {"PYTHONPATH": os.pathsep.join(path), "FUSED_OPS_CACHE": str(self.parts / "tables")}
        return alone() | own | {"TORCHINDUCTOR_CACHE_DIR": str(self.inductor)}

    def do(self, step: Step) -> None:
        started, crashed = self.clock(), False
        if reason := self.why_not(step):
            return self.tell(step, "skipped", reason, 0)
        while True:
            limit = self.limit(step)
            if limit < step.least_s:
                return self.tell(step, "skipped", f"skipped: {max(limit, 0):.0f} s were left for it", 0)
            command = self.command(step, limit, crashed)
            try:
                status, tail = self.execute(command, limit, self.out / "log.txt", step.name, self.environment())
            except (SystemExit, KeyboardInterrupt):
                self.tell(step, "cut", "stopped by a signal", self.clock() - started)
                raise
            if status != CONTEXT_LOST or not step.measures:
                break
            crashed = True  # the measurement that lost the context is in the CSV as an error; go on after it
        good = status == 0 or (status == NOTHING_TO_RUN and step.measures)
        verdict = "ok" if good else "cut" if status == 124 else "failed"
        self.failed |= verdict == "failed"
        said = tail if good else f"stopped at its limit: {tail}" if verdict == "cut" else f"FAILED (status {status}): {tail}"
        self.tell(step, verdict, said, self.clock() - started)

    def tell(self, step: Step, status: str, said: str, seconds: float) -> None:
        """Note what a step said, and write all files that tell of it."""
        self.done.append({"name": step.name, "status": status, "seconds": round(seconds, 1), "said": said})
        print(f"[{self.left():5.0f} s left] {step.name} ({seconds:.0f} s): {said}", flush=True)
        try:
            self.write()
        except Exception as error:  # a full disk or a damaged part must not end the run
            print(f"bench/gpu.sh: the summary could not be written: {type(error).__name__}: {error}", flush=True)

    def write(self) -> None:
        """summary.md, machine.json, benchmark.json, tuned.json and results.tar.gz as they stand."""
        record = machine_record(self.args.call, self.args.seconds, self.started, self.done)
        write_machine(self.out, record)
        machine = "\n".join(f"- {k}: {v}" for k, v in record.items() if v and k != "steps")
        rows = "\n".join(f"| {s['name']} | {s['seconds']:.0f} s | {s['said'].replace('|', '/')} |" for s in self.done)
        text = f"# GPU run\n\n{machine}\n\n| step | time | result |\n|---|---|---|\n{rows}\n{self.drift()}"
        write_whole(self.out / "summary.md", text.encode())
        merge_json(sorted(self.parts.glob("*.json")), self.out / "benchmark.json")
        tables = sorted((self.parts / "tables").glob("*.json"))
        if tables:
            write_whole(self.out / "tuned.json", read(tables[-1]))
        gather(self.inductor, self.out / NAME)
        pack(self.out)

    def drift(self) -> str:
        """A sentence for each limit of the hardware that moved during the run."""
        from .record import read as read_rows
        from .roofline import drift

        results = self.out / "results.csv"
        try:
            said = drift(read_rows(results)) if results.exists() else []
        except ValueError as error:  # a damaged file: the rest of the summary is still true
            said = [f"results.csv could not be read: {error}"]
        return "".join(f"\n{sentence}\n" for sentence in said)

    def all(self) -> int:
        """Run every step. Returns the exit status: 1 where a step failed."""
        finished = self.finished() if self.args.resume else set()
        for step in self.steps():
            if step.name not in finished:
                self.do(step)
        return int(self.failed)

    def finished(self) -> set[str]:
        """The steps that an earlier run into out has ended well; they stay in its record."""
        file = self.out / "machine.json"
        earlier = json.loads(read(file))["steps"] if file.exists() else []
        self.done = [s for s in earlier if s["status"] == "ok"]
        return {s["name"] for s in self.done}


def _tool(name: str) -> str | None:
    """Where a tool of CUDA is. Its module imports torch: not before it is asked for."""
    from .profile import profiler
    from .sanitize import sanitizer

    return {"compute-sanitizer": sanitizer, "ncu": profiler}[name]()


def execute(command: list[str], limit: float, log: Path, name: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run with all output appended to log. Returns (status, the last line); 124 when the limit stopped it."""
    with log.open("ab") as file:
        file.write(f"\n===== {name}: {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            kill(process)
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return status, last_line(lines)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: politely, and after two seconds not."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(lines: list[str]) -> str:
    """The last line that says something, without pytest's rule of equals signs."""
    said = [line.strip("= \t") for line in lines]
    return next((re.sub(r"\s+", " ", line) for line in reversed(said) if line), "")[:300]


def merge_json(parts: list[Path], target: Path) -> None:
    """One pytest-benchmark file from those of the steps; a part that was cut short is left out."""
    whole: dict[str, Any] = {}
    benchmarks: list[object] = []
    for part in parts:
        try:
            content = json.loads(read(part))
        except (OSError, ValueError):
            continue
        for benchmark in content.pop("benchmarks"):
            benchmark["stats"].pop("data", None)  # the samples: their quantiles are in the CSV
            benchmarks.append(benchmark)
        whole = content
    if whole:
        write_whole(target, json.dumps({**whole, "benchmarks": benchmarks}).encode())


def tell_plan(run: Run) -> None:
    """Print second by second what the plan would run when each step takes its limit."""
    print(f"{run.args.call}: {run.plan.what}\nWould run within {run.args.seconds:.0f} s, into {run.out}:")
    begin = run.clock()
    elapsed = 0.0
    run.clock = lambda: begin + elapsed
    for step in run.steps():
        reason = run.why_not(step)
        limit = 0.0 if reason else run.limit(step)
        if not reason and limit < step.least_s:
            reason, limit = f"skipped: {max(limit, 0):.0f} s would be left for it", 0.0
        print(f"  {elapsed:4.0f} - {elapsed + limit:4.0f} s  {step.name:<15} {step.what}{f'  [{reason}]' * bool(reason)}")
        if not reason:
            print(f"{'':20}{' '.join(run.command(step, limit))}")
        elapsed += limit
    print(f"  {elapsed:4.0f} - {elapsed + CLOSE_S:4.0f} s  {'close':<15} summary and results.tar.gz")
    sweeps = [n for s in run.steps() for word in s.command if word.startswith("--bench-sweep=") for n in word[14:].split(",")]
    if sweeps:
        from .headline import headline_tasks, sweep
        from .providers import PROVIDERS

        names = [p.name for p in PROVIDERS]
        print(f"Headline rows, {len(headline_tasks())} of them, in this order:")
        print("\n".join(f"  {task.id}" for task in headline_tasks() if re.search(run.args.only, task.id)))
        for number in sweeps:
            pairs = sweep([int(number)], names)
            print(
                f"Sweep {number}: {', '.join(dict.fromkeys(name for _, name in pairs))}: {len(pairs)} measurements at the most"
            )


def _stop(*_: Any) -> None:
    """On SIGTERM: the step in progress is ended with all that it started, and what it measured is packed."""
    sys.exit(128 + signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    run = Run(args)
    signal.signal(signal.SIGTERM, _stop)
    try:
        if args.dry_run:
            with contextlib.suppress(BrokenPipeError):  # the reader, such as head, has had enough
                tell_plan(run)
                sys.stdout.flush()
            return 0
        import torch

        if not torch.cuda.is_available():
            print("bench/gpu.sh: no CUDA device: nothing was run; --dry-run says what would", file=sys.stderr)
            return 2
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            for name in ("results.csv", "correctness.csv", "log.txt", "tuned.json", "benchmark.json", NAME, "results.tar.gz"):
                (args.out / name).unlink(missing_ok=True)
        status = run.all()
        print((args.out / "summary.md").read_text())
        return status
    finally:
        shutil.rmtree(run.parts, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
