"""Puts mutants into copies of the sources, one at a time, and runs the tests that should notice them."""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import py_compile
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from . import clock
from .mutant import ROOT, Mutant, Selection

OPTIONS = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=line", "-rfE")
SECONDS = 900.0  # what a selection may take; one that takes longer hangs
NO_TESTS = 5  # pytest's status


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant.

    verdict: "killed", "survived", "equivalent" (not run), or "error" (it does not apply, has no tests, or what noticed it fails without it too). by: the test
    that noticed it, or how the run ended. tests: the selection that did. seconds: of all its runs.
    """

    id: str
    area: str
    path: str
    fault: str
    verdict: str
    by: str = ""
    tests: str = ""
    seconds: float = 0.0

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Copy:
    """The files that git knows, or would, in a folder of their own, with two servers: kernels interpreted, and not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            source, target = ROOT / name, folder / name
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        # Bytecode that is asked for its source's hash: a change within the same second, of the same length, is seen.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(folder, quiet=2, invalidation_mode=mode)
        self._servers: dict[bool, subprocess.Popen[str]] = {}

    def run(self, tests: Selection, seconds: float, only: Sequence[str] = ()) -> tuple[int | None, str]:
        """(pytest's status, the first failed test or the last line). only: what pytest is given instead of the whole selection."""
        log = self.folder.parent / f"{self.folder.name}.log"
        into, answers = self._server(tests.interpreted)
        print(
            json.dumps({"arguments": [*OPTIONS, *tests.arguments], "seconds": seconds, "log": str(log)}), file=into, flush=True
        )
        answer = answers.readline()
        if not answer:
            raise RuntimeError("the server of the tests has ended")
        text = log.read_text(errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        lines = text.strip().splitlines() or [""]
        status: int | None = json.loads(answer)["status"]
        return status, failed[0] if failed else lines[-1][-200:]

    def _server(self, interpreted: bool) -> tuple[IO[str], IO[str]]:
        server = self._servers.get(interpreted)
        if server is None:
            environment = {
                k: v
                for k, v in os.environ.items()
                if k not in ("TRITON_INTERPRET", "FUSED_OPS_BACKEND", "PYTHONDONTWRITEBYTECODE")
            }
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
            environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(self.folder)}
            environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
            command = [sys.executable, "-m", "tests.mutate.server"]
            server = self._servers[interpreted] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder, env=environment
            )
            assert server.stdout is not None
            assert server.stdout.readline(), "the server of the tests did not start"
        assert server.stdin is not None
        assert server.stdout is not None
        return server.stdin, server.stdout

    def close(self) -> None:
        for server in self._servers.values():
            assert server.stdin is not None
            server.stdin.close()
            server.wait()

    @contextlib.contextmanager
    def holding(self, mutant: Mutant) -> Iterator[None]:
        """While active, the copy has the fault."""
        path = self.folder / mutant.path
        source = path.read_text()
        path.write_text(mutant.mutated(source))
        try:
            yield
        finally:
            path.write_text(source)


class Confirmed:
    """Of what noticed a mutant, whether it passes on the sources as they are: else it notices nothing."""

    def __init__(self) -> None:
        self._known: dict[tuple[Selection, str], str] = {}

    def failing(self, copy: Copy, tests: Selection, status: int | None, said: str) -> str:
        """How what noticed a mutant fails without it; "" where it passes. status, said: of the run that noticed.

        That is one test; or, where no test began, that all are collected; or, where none is named, the whole selection.
        """
        only = [said] if said.startswith("tests/") and "::" in said else []
        if not only and status is not None and status > 1:
            only = [*tests.arguments, "--collect-only"]
        key = tests, " ".join(only)
        if key not in self._known:
            status, found = copy.run(tests, SECONDS, only)
            self._known[key] = "" if status == 0 else f"{found} (status {status})"
        return self._known[key]


def outcome(mutant: Mutant, copy: Copy, confirmed: Confirmed) -> Outcome:
    """Run a mutant's tests, until one of them notices it."""

    def of(verdict: str, by: str = "", tests: str = "") -> Outcome:
        seconds = round(clock.seconds() - start, 1)
        return Outcome(mutant.id, mutant.area, mutant.path, mutant.fault, verdict, by, tests, seconds)

    start = clock.seconds()
    if mutant.equivalent:
        return of("equivalent", mutant.equivalent)
    for tests in mutant.runs:
        try:
            with copy.holding(mutant):
                status, said = copy.run(tests, SECONDS)
        except LookupError as error:
            return of("error", str(error))
        if status == NO_TESTS:
            return of("error", f"no tests: {said}", str(tests))
        if status != 0:
            if failing := confirmed.failing(copy, tests, status, said):
                return of("error", f"fails without the mutant: {failing}", str(tests))
            how = (
                f"hang: not done in {SECONDS:.0f} s" if status is None else said if status > 0 else f"signal {-status}: {said}"
            )
            return of("killed", how, str(tests))
    return of("survived", "", "; ".join(map(str, mutant.runs)))


def run_all(mutants: list[Mutant], jobs: int, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Run the mutants over so many copies at once; done is told of each outcome as it comes."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    found: list[Outcome] = []
    confirmed, lock, errors = Confirmed(), threading.Lock(), list[BaseException]()

    def work(folder: Path) -> None:
        copy = Copy(folder)
        try:
            while not errors:
                result = outcome(waiting.get_nowait(), copy, confirmed)
                with lock:
                    found.append(result)
                    done(result)
        except queue.Empty:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            copy.close()

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        workers = [threading.Thread(target=work, args=(Path(folder) / f"copy{i}",)) for i in range(jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if errors:
        raise errors[0]
    return found
