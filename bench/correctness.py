"""Tests on a GPU that survive each other: a line of CSV a test as it ends, whatever crashes, hangs or loses the context.

python -m bench.correctness CSV --processes N --timeout S --seconds S PATH...

The tests of the paths are shared one by one among worker processes of plain pytest, in the order collected. A worker that
crashed, hung or lost its CUDA context is replaced, and takes one test with it. At the end, tests that ran out of memory run
again alone, and those that lost the device run again with CUDA_LAUNCH_BLOCKING=1, where the error names the kernel.
Exit status: 0 when nothing failed, 1 when something did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from .correctness_plugin import short
from .correctness_worker import DUMP_S, Worker, place
from .environment import ROOT, alone
from .files import lines

OUTCOMES = ("passed", "failed", "error", "lost", "hang", "skipped")
BAD = ("failed", "error", "lost", "hang")
GRACE_S = 5.0  # after --seconds, for the tests that are running
STARTUP_S = 120.0
CONTEXT_BYTES = 3 << 28  # of device memory, of a process that has done nothing yet
MOST_REPEATED = 12  # lost tests that are run again to name their kernels
OUT_OF_MEMORY = re.compile(r"out of memory", re.IGNORECASE)
DRIVER_ERROR = re.compile(r"CUDA (driver )?error|Triton Error|cuLaunch", re.IGNORECASE)


@dataclass
class Result:
    """A row of the CSV. outcome: one of OUTCOMES. worker: which process ran the test. kernel: the one that failed, if known."""

    test: str
    outcome: str
    seconds: float
    worker: int
    kernel: str = ""
    message: str = ""


COLUMNS = tuple(field.name for field in fields(Result))


class Run:
    """All that is known of one run, and its processes."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.started = time.monotonic()
        self.deadline = self.started + args.seconds
        self.tests: list[str] | None = None
        self.needs: list[int] = []
        self.limits: list[float] = []
        self.memory = float("inf")  # that tests may hold together, in bytes
        self.results: dict[str, Result] = {}
        self.workers: list[Worker] = []
        self.numbers = self.stillborn = 0
        self.unlike: list[int] = []  # workers that collected other tests
        self.pending: list[int] = []
        self.repeat = ""  # "", "alone" or "blocking"
        self.out_of_memory: list[int] = []
        self.unnamed: list[int] = []
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)

    def everything(self) -> None:
        self.go(self.args.processes, spares=self.args.processes // 6)
        for repeat, tests in (("alone", self.out_of_memory), ("blocking", self.unnamed[:MOST_REPEATED])):
            self.repeat, self.pending = repeat, list(tests)
            if tests and time.monotonic() < self.deadline:
                self.go(1 if repeat == "alone" else min(len(tests), self.args.processes), spares=0)

    def go(self, processes: int, spares: int) -> None:
        """Run what is pending, until it is done or the time is spent. spares: workers that stand by for one that is lost."""
        while True:
            late = time.monotonic() - self.deadline
            busy = [w for w in self.workers if w.current is not None]
            if late > GRACE_S or (not busy and (late > 0 or (self.tests is not None and not self.pending))):
                break
            if late <= 0:
                self.hand_out(processes)
                wanted = processes + spares if self.tests is None else min(processes + spares, len(self.pending) + len(busy))
                while len([w for w in self.workers if not (w.hung or w.dismissed)]) < wanted and self.may_start():
                    self.start()
            if not self.workers:
                break
            for ready in wait([w.connection for w in self.workers if not w.closed], 0.1):
                self.hear(next(w for w in self.workers if w.connection is ready))
            self.bury()
            self.watch()
        self.dismiss()

    def may_start(self) -> bool:
        """Until one has collected the tests, a process that died at its start says that the next would too."""
        return self.stillborn == 0 if self.tests is None else self.stillborn <= self.args.processes + 3

    def start(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
        command += ["-p", "bench.correctness_plugin", "-p", "no:xdist", "-p", "no:randomly", "-p", "no:cacheprovider"]
        command += ["-k", self.args.k] if self.args.k else []
        threads = str(max(1, (os.cpu_count() or 1) // self.args.processes))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"} | alone()
        if self.repeat == "blocking":
            environment["CUDA_LAUNCH_BLOCKING"] = "1"
        self.numbers += 1
        self.workers.append(Worker(self.numbers, command + self.args.paths, environment, self.folder))

    def hand_out(self, processes: int) -> None:
        """The next tests to the free workers: the first that fits the memory, or any where nothing else runs."""
        for worker in filter(Worker.free, list(self.workers)):
            busy = [w.current for w in self.workers if w.current is not None]
            left = self.memory - sum(self.needs[i] for i in busy)
            index = next((i for i in self.pending if not busy or self.needs[i] <= left), None)
            if index is None or len(busy) >= processes:
                return
            if worker.give(index):
                self.pending.remove(index)
            else:
                worker.closed = True

    def hear(self, worker: Worker) -> None:
        try:
            kind, *said = worker.connection.recv()
        except (EOFError, OSError):
            worker.closed = True
            return
        if kind == "collected":
            self.collected(worker, *said)
            return
        outcome, seconds, message, traceback = said
        if not worker.hung:
            self.end(worker, outcome, seconds, message, traceback)
        if outcome == "lost" or self.repeat == "blocking":  # it is ending, or it was started for this test
            worker.dismissed = worker.give(None) or True

    def collected(
        self, worker: Worker, found: list[tuple[str, int, float]], memory: int, errors: list[tuple[str, str]]
    ) -> None:
        """found: (test, bytes of device memory that it may hold, seconds that it may take) of each."""
        tests = [test for test, *_ in found]
        if self.tests is None:
            self.tests, self.needs, self.limits = tests, [need for _, need, _ in found], [limit for *_, limit in found]
            before = failures(self.args.first) if self.args.first else set()
            self.pending = sorted(range(len(tests)), key=lambda i: tests[i] not in before)
            if memory:
                self.memory = 0.85 * memory - CONTEXT_BYTES * (self.args.processes + self.args.processes // 6)
            for file, message in errors:
                lines = message.strip().splitlines() or [""]
                self.write(Result(f"{file} (not collected)", "error", 0.0, worker.number, "", short(lines[-1])), message)
        if tests != self.tests:
            self.unlike.append(worker.number)
            print(f"worker {worker.number} collected {len(tests)} tests, not the {len(self.tests)} of the first", flush=True)
            worker.give(None)
        worker.ready = True

    def bury(self) -> None:
        """Workers whose process has ended, or cannot be ended."""
        for worker in list(self.workers):
            if not worker.over():
                continue
            while not worker.closed and worker.connection.poll():
                self.hear(worker)
            self.workers.remove(worker)
            worker.connection.close()
            worker.kill()  # what it may have left running
            if worker.current is not None:
                self.died(worker)
            elif not worker.dismissed:
                self.stillborn += 1
                print(f"worker {worker.number} ended unasked: {worker.how()}\n{worker.said()[-3000:]}", flush=True)

    def died(self, worker: Worker) -> None:
        """With a test."""
        said, seconds = worker.said(), time.monotonic() - worker.since
        assert worker.current is not None
        message = f"no end after {self.limit(worker.current):g} s" if worker.hung else worker.how()
        at = place(said)
        self.end(worker, "hang" if worker.hung else "lost", seconds, f"{message}; at {at}" if at else message, said[-3000:])

    def limit(self, index: int) -> float:
        """Seconds that a test may take."""
        return max(self.args.timeout, self.limits[index])

    def watch(self) -> None:
        """Tests that take too long, and processes that do not get to their first."""
        now = time.monotonic()
        for worker in self.workers:
            limit = self.limit(worker.current) if worker.current is not None else STARTUP_S
            if now - worker.since > limit and (worker.current is not None or not worker.ready):
                worker.hangs()

    def end(self, worker: Worker, outcome: str, seconds: float, message: str, traceback: str) -> None:
        """A test ended: its line, and whether it is to run again at the end."""
        assert worker.current is not None
        assert self.tests is not None
        index, worker.current, worker.since = worker.current, None, time.monotonic()
        driver = outcome in BAD and (outcome == "lost" or DRIVER_ERROR.search(message) is not None)
        kernel = kernel_of(message) or (kernel_of(traceback) if driver else "")
        result = Result(self.tests[index], outcome, seconds, worker.number, kernel, short(message))
        if self.repeat == "alone":
            result.message = short(f"{message} (alone, after it had run out of memory)") if outcome in BAD else result.message
        elif self.repeat == "blocking":
            first = self.results[result.test]
            again = f"again with CUDA_LAUNCH_BLOCKING=1: {outcome} {message}"
            result = Result(
                first.test, first.outcome, first.seconds, first.worker, kernel or first.kernel, f"{first.message}; {again}"
            )
        elif outcome in BAD and OUT_OF_MEMORY.search(message):
            self.out_of_memory.append(index)
        elif driver:
            self.unnamed.append(index)
        self.write(result, traceback)

    def write(self, result: Result, traceback: str = "") -> None:
        """The line of a test that ended for the first time; else the whole file anew."""
        again = result.test in self.results
        self.results[result.test] = result
        if result.outcome in BAD:
            at = time.monotonic() - self.started
            print(f"[{at:.1f} s] {result.outcome} {result.test}: {result.message}\n{traceback}", flush=True)
        target = self.args.csv.with_name(self.args.csv.name + ".new") if again else self.args.csv
        with target.open("w" if again else "a", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            if again:
                writer.writerow(COLUMNS)
            writer.writerows(map(row, self.results.values() if again else [result]))
        if again:
            target.replace(self.args.csv)

    def dismiss(self) -> None:
        """End every process: at once those that are at work, the others when they have tidied up."""
        for worker in self.workers:
            if worker.current is not None or not worker.ready or not (worker.dismissed or worker.give(None)):
                worker.kill()
        until = time.monotonic() + DUMP_S
        for worker in self.workers:
            try:
                worker.process.wait(max(until - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                worker.kill()
            worker.connection.close()
        self.workers = []

    def status(self) -> int:
        bad = [r for r in self.results.values() if r.outcome in BAD]
        done = any(r.outcome in ("passed", "skipped") for r in self.results.values())
        return int(bool(bad or self.unlike or not done))

    def summary(self) -> str:
        """The last line."""
        count = Counter(r.outcome for r in self.results.values())
        said = [f"{count[name]} {name}" for name in OUTCOMES if name != "error" or count[name]]
        left = len(self.tests or ()) - len([t for t in self.results if not t.endswith("(not collected)")])
        bad = [r for r in self.results.values() if r.outcome in BAD]
        first = [f"first: {bad[0].test}: {f'{bad[0].kernel}: ' if bad[0].kernel else ''}{bad[0].message[:160]}"] if bad else []
        first += ["no worker could collect the tests"] if self.tests is None else []
        first += [f"{len(self.unlike)} workers collected other tests"] if self.unlike else []
        time_taken = f"{', '.join(said)}, {left} not run in {time.monotonic() - self.started:.0f} s"
        return "correctness: " + "; ".join([time_taken, *first])


def row(result: Result) -> tuple[Any, ...]:
    return astuple(Result(**{**vars(result), "seconds": f"{result.seconds:.3f}"}))


@functools.cache
def our_kernels() -> frozenset[str]:
    sources = [path.read_text() for path in (ROOT / "kernels").rglob("*.py")]
    return frozenset(name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


def kernel_of(text: str) -> str:
    """The first of our kernels that text names, or else the first word that ends like one, or ""."""
    ours = our_kernels()
    names = re.findall(r"\b\w+_kernel\b", text)
    return next((name for name in names if name in ours), names[0] if names else "")


def failures(path: Path) -> set[str]:
    """The tests that did not pass in an earlier CSV."""
    return {line["test"] for line in csv.DictReader(lines(path)) if line["outcome"] in BAD}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.correctness", description=__doc__)
    parser.add_argument("csv", type=Path, help=f"one line a test: {', '.join(COLUMNS)}")
    parser.add_argument("paths", nargs="+", help="files, folders or tests, as pytest takes them")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds that one test may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after so many no test is begun; 5 more to end")
    parser.add_argument("--first", type=Path, help="an earlier CSV, whose failures run first")
    parser.add_argument("-k", default="", help="as pytest's")
    parser.add_argument("--allow-cpu", action="store_true", help="run without a GPU")
    args = parser.parse_args(argv)
    args.paths = [absolute(path) for path in args.paths]
    if args.processes < 1:
        parser.error(f"--processes: got {args.processes}, at least 1")
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    if args.first and not args.first.is_file():
        parser.error(f"--first: no file {args.first}")
    return args


def absolute(path: str) -> str:
    """A path, or a test's id, whatever the working directory of the workers."""
    file, colons, test = path.partition("::")
    return f"{Path(file).resolve()}{colons}{test}"


class StoppedError(Exception):
    """SIGTERM came."""


def stop(*_: object) -> None:
    raise StoppedError


def main(argv: Iterable[str] | None = None) -> int:
    args = arguments(None if argv is None else list(argv))
    if not args.allow_cpu:
        import torch

        if not torch.cuda.is_available():
            print("bench.correctness: no CUDA device: nothing was run")
            return 2
    stopped = False
    with tempfile.TemporaryDirectory(prefix="correctness-") as folder:
        signal.signal(signal.SIGTERM, stop)
        run = Run(args, Path(folder))
        try:
            run.everything()
        except (StoppedError, KeyboardInterrupt):
            stopped = True
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for worker in run.workers:
                worker.kill()
    print(run.summary() + ("; it was stopped" if stopped else ""), flush=True)
    return 1 if stopped else run.status()


if __name__ == "__main__":
    sys.exit(main())
