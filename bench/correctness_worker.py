"""A process of bench.correctness that runs tests, as the parent sees it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from multiprocessing import Pipe
from pathlib import Path

from .correctness_plugin import PIPE
from .environment import ROOT

DUMP_S = 2.0  # for a process that hangs to say where, before it is killed; and between two attempts to kill it
ATTEMPTS = 4
PYTEST = re.compile(r"[/\\](_pytest|pluggy|pytest|correctness_plugin)[/\\.]|<frozen runpy>")  # in a path
FRAME = re.compile(r'^  File "(.*?)", line (\d+) in (.*)$', re.MULTILINE)


class Worker:
    """A process of pytest that runs the tests it is handed. current: the index of the one that it runs now."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.number, self.log = number, folder / f"{number}.txt"
        self.connection, theirs = Pipe()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={**environment, PIPE: str(theirs.fileno())}, pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip
        theirs.close()
        self.ready = self.closed = self.dismissed = self.hung = False
        self.current: int | None = None
        self.since = time.monotonic()
        self.ends_by: float | None = None  # a process that was told to end has until then
        self.attempts = 0

    def give(self, index: int | None) -> bool:
        """Hand it a test, or None for no more. False: it is dead already."""
        try:
            self.connection.send(index)
        except OSError:
            return False
        self.current, self.since = index, time.monotonic()
        self.dismissed = index is None
        return True

    def free(self) -> bool:
        return self.ready and not self.closed and not self.dismissed and not self.hung and self.current is None

    def kill(self) -> None:
        """It and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def hangs(self) -> None:
        """Have it write where it is, and end; it is killed if it does not."""
        if self.ends_by is None:
            self.hung, self.ends_by = True, time.monotonic() + DUMP_S
            self.process.send_signal(signal.SIGABRT)

    def over(self) -> bool:
        """Whether its process has ended; one that cannot be killed, for it waits inside the driver, counts as ended too."""
        if self.process.poll() is not None:
            return True
        if self.ends_by is None and self.closed:
            self.ends_by = time.monotonic() + DUMP_S
        if self.ends_by is None or time.monotonic() < self.ends_by:
            return False
        self.kill()
        self.attempts += 1
        self.ends_by = time.monotonic() + DUMP_S
        return self.attempts >= ATTEMPTS

    def how(self) -> str:
        """How its process ended."""
        code = self.process.returncode
        if code is None:
            return "cannot be killed"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def said(self) -> str:
        """What it printed, without pytest's own calls."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not PYTEST.search(line))


def place(said: str) -> str:
    """Where a process was when it crashed, from what faulthandler wrote: the innermost calls, or ""."""
    thread = said.rpartition("Current thread")[2]
    calls = [f"{Path(path).name}:{line} {name}" for path, line, name in FRAME.findall(thread) if not PYTEST.search(path)]
    return " < ".join(calls[:4])
