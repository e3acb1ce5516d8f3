"""pytest-benchmark as the harness: the CSV beside its JSON, the time budget, and what machine the numbers come from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .environment import environment
from .record import Recorder
from .roofline import Roofline


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-ops bench")
    group.addoption("--bench-csv", type=Path, default=None, help="append a CSV row a measurement to this file")
    group.addoption("--bench-only", default="", help="regular expression on a measurement's id, such as softmax-4k-bf16")
    group.addoption("--bench-sweep", default="", help="sweeps over the headline rows in place of the matrix, such as 1,2")
    group.addoption("--bench-budget", type=float, default=None, help="seconds after which nothing new is started")
    group.addoption("--bench-until", type=float, default=None, help="the same as a time of day: seconds since 1970")
    group.addoption("--bench-patience", type=float, default=0, help="seconds that one measurement may take; 0: any time")
    group.addoption("--bench-resume", action="store_true", help="leave out what the CSV already holds, but for errors")
    group.addoption("--bench-after-crash", action="store_true", help="with --bench-resume: leave errors out too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """`pytest bench` means to measure: the project's default of --benchmark-disable is for its tests."""
    asked = config.invocation_params.args
    if "--benchmark-disable" not in asked and "--benchmark-skip" not in asked:
        config.option.benchmark_enable = True
    config.stash[_RECORDER] = recorder = Recorder(config.getoption("--bench-csv"))
    config.stash[_EARLIER] = len(recorder.rows)
    budget, until = config.getoption("--bench-budget"), config.getoption("--bench-until")
    never = float("inf")
    deadline = min(time.time() + (never if budget is None else budget), never if until is None else until)
    config.pluginmanager.register(_Stopper(deadline), "fused-ops-deadline")


_RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()
_EARLIER: pytest.StashKey[int] = pytest.StashKey()
OUT_OF_TIME = "the time budget is spent"


class _Stopper:
    """Ends the session at its deadline. What was measured stays, and to have been stopped is no failure."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.session: pytest.Session | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        self.session = session
        if session.items and time.time() > self.deadline:
            session.shouldstop = OUT_OF_TIME
            return True  # the loop has been run, and nothing in it
        return None

    def pytest_runtest_logfinish(self) -> None:
        if self.session is not None and time.time() > self.deadline:
            self.session.shouldstop = OUT_OF_TIME

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.shouldstop == OUT_OF_TIME and session.testsfailed == 0:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.session is not None and self.session.shouldstop == OUT_OF_TIME:
            terminalreporter.write_line(OUT_OF_TIME)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= environment()
    machine_info["node"] = machine_info["release"] = ""  # results are published; the host's names are nobody's business


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_RECORDER].finish()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of the output: what this session recorded."""
    rows = config.stash[_RECORDER].rows[config.stash[_EARLIER] :]
    if rows:
        counts = Counter(row["status"] for row in rows)
        first = next(
            (
                f"; first: {r['op']}-{r['case']}-{r['pass']} {r['provider']}: {r['reason']}"
                for r in rows
                if r["status"] in ("wrong", "error")
            ),
            "",
        )
        print("recorded: " + ", ".join(f"{counts[status]} {status}" for status in sorted(counts)) + first)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Where rows go."""
    return request.config.stash[_RECORDER]


@pytest.fixture(scope="session")
def patience(request: pytest.FixtureRequest) -> float:
    """Seconds that one measurement may take; 0 for any time."""
    return float(request.config.getoption("--bench-patience"))


@pytest.fixture(scope="session")
def measured_already(request: pytest.FixtureRequest, recorder: Recorder) -> Callable[..., bool]:
    """Whether --bench-resume leaves out the measurement of these columns."""
    resume, after_crash = request.config.getoption("--bench-resume"), request.config.getoption("--bench-after-crash")
    return lambda key: resume and recorder.done(key, errors_too=after_crash)


@pytest.fixture(scope="session")
def roofline(recorder: Recorder) -> Roofline | None:
    """The limits measured last on this GPU, in this run or the one that is resumed; None where they were not."""
    return Roofline.from_rows(recorder.rows, environment()["gpu"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(int(time.time()))  # fresh numbers in every run: a provider must be right on any input
