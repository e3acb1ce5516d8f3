"""The pytest plugin in each worker of bench.correctness: it runs the tests that the parent names, and tells how each ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import pytest

PIPE = "BENCH_CORRECTNESS_PIPE"  # the file descriptor of this worker's end of the connection
DEFAULT_BYTES = 1 << 30  # of a test without the marker memory(bytes)
MESSAGE = 600  # characters of a message that are kept
TRACEBACK = 6000


def device_error() -> str:
    """What the CUDA context says when everything queued has ended: "" while it lives, or where it was never made."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:  # from then on every call raises
        return str(error) or type(error).__name__
    return ""


def device_memory() -> int:
    """Bytes of the CUDA device's memory; 0 without one."""
    torch = sys.modules.get("torch")
    try:
        return torch.cuda.get_device_properties(0).total_memory if torch is not None and torch.cuda.is_available() else 0
    except Exception:  # the tests will say more
        return 0


def marked(item: pytest.Item, name: str, default: float) -> float:
    """The argument of a test's marker."""
    mark = item.get_closest_marker(name)
    return mark.args[0] if mark is not None else default


class Worker:
    """Takes the place of pytest's own loop over the tests."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reports: list[pytest.TestReport] = []
        self.errors: list[tuple[str, str]] = []  # (file, message) of what could not be collected

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append((report.nodeid, report.longreprtext))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        tests = [
            (item.nodeid, int(marked(item, "memory", DEFAULT_BYTES)), float(marked(item, "seconds", 0)))
            for item in session.items
        ]
        self.connection.send(("collected", tests, device_memory(), self.errors))
        while True:
            try:
                index = self.connection.recv()
            except (EOFError, OSError):  # the parent is gone
                os._exit(3)
            if index is None:
                return True
            self.run(session.items[index])

    def run(self, item: pytest.Item) -> None:
        self.reports = []
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        outcome, message, traceback = summary(self.reports)
        if lost := device_error():
            outcome = "lost"
            message = f"{message}; the context is lost: {lost}" if message else f"the context is lost: {lost}"
        seconds = sum(report.duration for report in self.reports)
        self.connection.send(("ended", outcome, seconds, short(message), traceback[-TRACEBACK:]))
        if lost:
            os._exit(4)  # at once: every other ending would ask the device for something

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)


def summary(reports: list[pytest.TestReport]) -> tuple[str, str, str]:
    """(outcome, message, traceback) of a test from the reports of its setup, call and teardown."""
    for report in sorted(reports, key=lambda r: r.when != "call"):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = report.longreprtext
            message = crash.message if crash is not None else (text.strip().splitlines() or [""])[-1]
            return "failed" if report.when == "call" else "error", message, text
    for report in reports:
        if report.skipped:
            reason: Any = getattr(report, "wasxfail", None) or report.longrepr
            return "skipped", str(reason[2] if isinstance(reason, tuple) else reason), ""
    return ("passed", "", "") if reports else ("error", "pytest reported nothing", "")


def short(message: str) -> str:
    """On one line, its beginning and, where that is too long, its end."""
    line = " ".join(message.split())
    return line if len(line) <= MESSAGE else f"{line[: MESSAGE - 200]} ... {line[-195:]}"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    fd = os.environ.pop(PIPE, None)  # what a test starts is no worker
    if fd is None:
        return
    os.set_inheritable(int(fd), False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no file of the process's size
    with contextlib.suppress(Exception):  # Linux: this process ends with the parent, even one that was killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    config.addinivalue_line("markers", "memory(bytes): the most device memory that the test holds, estimated")
    config.addinivalue_line("markers", "seconds(n): the test may take so many, where --timeout is less")
    config.pluginmanager.register(Worker(Connection(int(fd))), "bench-correctness")
