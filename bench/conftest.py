"""pytest-benchmark as the harness: the CSV beside its JSON, the time budget, and what machine the numbers come from."""

from __future__ import annotations

import time
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
    group.addoption("--bench-budget", type=float, default=None, help="seconds after which nothing new is started")
    group.addoption("--bench-resume", action="store_true", help="leave out what the CSV already holds, but for errors")
    group.addoption("--bench-after-crash", action="store_true", help="with --bench-resume: leave errors out too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """`pytest bench` means to measure: the project's default of --benchmark-disable is for its tests."""
    asked = config.invocation_params.args
    if "--benchmark-disable" not in asked and "--benchmark-skip" not in asked:
        config.option.benchmark_enable = True
    config.stash[_RECORDER] = Recorder(config.getoption("--bench-csv"))
    budget = config.getoption("--bench-budget")
    config.stash[_DEADLINE] = time.monotonic() + (float("inf") if budget is None else budget)


_RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()
_DEADLINE: pytest.StashKey[float] = pytest.StashKey()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= environment()
    machine_info["node"] = ""  # results are published; the host's name is nobody's business


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_RECORDER].finish()


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Where rows go."""
    return request.config.stash[_RECORDER]


@pytest.fixture(scope="session")
def measured_already(request: pytest.FixtureRequest, recorder: Recorder) -> Callable[..., bool]:
    """Whether --bench-resume leaves out the measurement of these columns."""
    resume, after_crash = request.config.getoption("--bench-resume"), request.config.getoption("--bench-after-crash")
    return lambda key: resume and recorder.done(key, errors_too=after_crash)


@pytest.fixture(autouse=True)
def _within_budget(request: pytest.FixtureRequest) -> None:
    if time.monotonic() > request.config.stash[_DEADLINE]:
        pytest.skip("the time budget is spent")


@pytest.fixture(scope="session")
def roofline(recorder: Recorder) -> Roofline | None:
    """The limits measured earlier in this run, or in the run that is resumed; None where they were not."""
    measured = {r["case"]: r for r in recorder.rows if r["kind"] == "roofline" and r["gpu"] == environment()["gpu"]}
    if "copy" not in measured:
        return None
    rates = {name: float(row["tflops"]) * 1e12 for name, row in measured.items() if name != "copy"}
    return Roofline(float(measured["copy"]["gbps"]) * 1e9, rates)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(int(time.time()))  # fresh numbers in every run: a provider must be right on any input
