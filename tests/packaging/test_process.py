"""tests/process.py: a program in a fork is what `python -c` would run, but for the import of torch that it shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import process


def test_a_program_starts_with_torch_and_nothing_of_ours() -> None:
    program = "import sys; print([name in sys.modules for name in ('torch', 'triton', 'fused_ops', 'tests')], __name__)"
    assert process.output(program) == "[True, False, False, False] __main__\n"


def test_nothing_of_one_program_is_left_for_the_next() -> None:
    process.output("import os, torch; import fused_ops; os.environ['LEFT'] = '1'; torch.left = 1")
    assert process.output("import os, sys, torch; print('fused_ops' in sys.modules, hasattr(torch, 'left'))") == "False False\n"
    assert process.output("import os; print(os.environ.get('LEFT'))") == "None\n"


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('refused')", 1, "refused\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(lambda: print('last', file=sys.stderr))", 0, "last\n"),
    ],
)
def test_status_and_errors_are_those_of_python(program: str, status: int, said: str) -> None:
    done = process.run(program)
    assert done.returncode == status
    assert done.stderr.endswith(said)
    assert bool(done.stderr) == bool(said)


def test_folder_and_environment(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("word = 'beside'")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "given.py").write_text("word = 'given'")
    program = (
        "import os, beside, given; print(os.getcwd(), sorted(os.environ) == ['ONLY', 'PYTHONPATH'], beside.word, given.word)"
    )
    environment = {"ONLY": "1", "PYTHONPATH": str(tmp_path / "path")}
    assert process.output(program, cwd=tmp_path, env=environment) == f"{os.path.realpath(tmp_path)} True beside given\n"


def test_what_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SECONDS", 1)
    assert process.run("import threading; threading.Event().wait()").returncode == -signal.SIGALRM


def test_a_command_of_the_program(tmp_path: Path) -> None:
    done = process.run(process.command("audit", "--arch", "1"), cwd=tmp_path)
    assert done.returncode == 2
    assert "allowed: some of 80" in done.stderr
