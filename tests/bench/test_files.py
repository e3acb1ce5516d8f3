"""Files of results that are no regular files: every reader of bench refuses them at once, and no command shows a traceback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.correctness import failures
from bench.files import MAX_FILE, lines, read, read_text
from bench.forecast import read_forecast
from bench.record import read as read_rows
from bench.results_format import FILES, FormatError
from bench.results_load import load
from tests import process
from tests.special_files import KINDS, not_waiting

READERS: dict[str, Callable[[Path], Any]] = {
    "read": read, "read_text": read_text, "lines": lines, "read_forecast": read_forecast, "read_rows": read_rows, "failures": failures,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_regular_files_only(name: str, kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "a")
    with not_waiting(), pytest.raises(OSError, match="allowed: a regular file"):
        READERS[name](tmp_path / "a")


def test_a_reader_takes_files_of_a_sensible_size(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(OSError, match=f"allowed: {MAX_FILE}"):
        read(tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_of_regular_files_only(kind: str, tmp_path: Path) -> None:
    for name in FILES:
        KINDS[kind](tmp_path / name)
        with not_waiting(), pytest.raises(FormatError, match=r"no regular file|is missing"):
            load(tmp_path)
        with not_waiting(), pytest.raises(FormatError, match=r"no regular file|is missing|machine\.json"):
            load(tmp_path / name)


def test_a_refused_variable_is_said_in_one_line() -> None:
    code = "from bench.__main__ import main; raise SystemExit(main(['plan']))"
    done = process.run(code, env=os.environ | {"FUSED_OPS_BENCH_PREPARE_S": "long"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "python -m bench plan: FUSED_OPS_BENCH_PREPARE_S: got 'long', allowed: seconds, a number of at least 0\n"
    )


@pytest.mark.parametrize("kind", [*KINDS, "nothing", "empty file"])
@pytest.mark.parametrize("arguments", [["compare", "@", "@"], ["report", "@"], ["publish", "@"]], ids=lambda a: a[0])
def test_a_command_says_so_in_one_line(
    arguments: list[str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas")
    path = tmp_path / "results"
    if kind == "empty file":
        path.touch()
    elif kind != "nothing":
        KINDS[kind](path)
    with not_waiting():
        status = main([str(path) if part == "@" else part for part in arguments])
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert said.err.startswith("python -m bench")
    assert str(path) in said.err
    assert said.err.count("\n") == 1
