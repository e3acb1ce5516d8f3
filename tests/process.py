"""Programs in processes of their own that share one import of torch: each is forked from a process that holds nothing else."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # after which a program is stopped, and its status is that of the signal
SERVER = """
import json, os, signal, sys
import torch

def next_program():
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, path in ((1, job["out"]), (2, job["err"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_TRUNC), stream)
            os.chdir(job["cwd"])
            os.environ.clear()
            os.environ.update(job["env"])
            sys.path[1:1] = [p for p in job["env"].get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
            signal.alarm(job["seconds"])
            return job["code"]
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()

exec(compile(next_program(), "<string>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends when this one does, for its input ends then."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def _pipes() -> tuple[IO[str], IO[str]]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    return server.stdin, server.stdout


def run(code: str, *, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What `python -c code` prints and returns, with torch imported before its first line.

    env: the whole environment (default: this process's); what torch reads when it is imported does not change. cwd: the
    folder it runs in.
    """
    into, answer = _pipes()
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        environment = dict(os.environ if env is None else env)
        job = {"code": code, "cwd": str(cwd), "env": environment, "out": out.name, "err": err.name, "seconds": SECONDS}
        print(json.dumps(job), file=into, flush=True)
        status = answer.readline()
        assert status, "the process that forks has ended"
        return subprocess.CompletedProcess(code, int(status), out.read(), err.read())


def output(code: str, *, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Like run; fails the test with what was printed where the status is not 0, and returns the standard output."""
    done = run(code, cwd=cwd, env=env)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def module(name: str, *arguments: str, library: Path | None = None) -> str:
    """The code of `python -m name arguments...`. library: loaded before it; whoever asks for a library of its soname gets it."""
    load = f"import ctypes; ctypes.CDLL({str(library)!r}); " if library else ""
    return f"{load}import runpy, sys; sys.argv = {[name, *arguments]!r}; runpy.run_module({name!r}, run_name='__main__')"


def command(*arguments: str) -> str:
    """The code of `python -m fused_ops arguments...`."""
    return f"import runpy, sys; sys.argv = {['fused-ops', *arguments]!r}; runpy.run_module('fused_ops', run_name='__main__')"
