"""The one reader of files: regular ones only, at once, and what was opened is what is read."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from fused_ops._runtime import files
from fused_ops._runtime.files import NotRegularError, TooLargeError, open_regular, read_regular
from tests.packaging.conftest import ROOT
from tests.packaging.sources import files as tracked
from tests.special_files import KINDS, not_waiting


def test_a_regular_file_is_read_and_closed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path / "a", str(tmp_path / "link")):
        assert read_regular(path, max_bytes=3) == b"abc"
    with open_regular(tmp_path / "a") as file:
        assert (file.read(), file.name) == (b"abc", str(tmp_path / "a"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "a")
    with not_waiting(), pytest.raises(NotRegularError, match=rf"a {kind.split()[0]}, allowed: a regular file"):
        open_regular(tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_in_the_place_of_a_file_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at the path and opening it: what counts is the open file."""
    (tmp_path / "a").write_bytes(b"abc")
    KINDS[kind](tmp_path / "b")
    opened = os.open

    def swap_and_open(path: str, *rest: int) -> int:
        os.replace(tmp_path / "a", tmp_path / "was")
        os.replace(tmp_path / "b", tmp_path / "a")
        return opened(path, *rest)

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    monkeypatch.setattr(os, "open", swap_and_open)
    with not_waiting(), pytest.raises(OSError, match=r"a regular file|Is a directory|No such device"):
        open_regular(tmp_path / "a")
    monkeypatch.undo()
    assert (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0) == before


def test_a_link_is_refused_where_none_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(NotRegularError, match="a symbolic link"):
        open_regular(tmp_path / "link", links=False)
    monkeypatch.setattr(files, "_require_regular", lambda *_: None)  # as if it was put there after the look
    with pytest.raises(OSError, match="symbolic link"):
        open_regular(tmp_path / "link", links=False)


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    with pytest.raises(TooLargeError, match="3 bytes, allowed: 2"):
        read_regular(path, max_bytes=2)
    with open_regular(path) as file:
        monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0,) * 6 + (2, 0, 0, 0)))
        with pytest.raises(TooLargeError, match="grew while it was read"):
            files.read_open(file)
    for bad in ("missing", "nul\0byte"):
        with pytest.raises((FileNotFoundError, ValueError)):
            open_regular(tmp_path / bad)


# Where a file is opened otherwise, and why nobody else can have put it there, or why it is no reading.
OTHERWISE = {
    "fused_ops/_runtime/files.py": "the reader itself",
    "fused_ops/_runtime/tuned_kernels.py": "the package's own sources",
    "fused_ops/_tools/forecast/model.py": "the package's own sources",
    "fused_ops/_tools/forecast/gpus.py": "the package's own coefficients",
    "fused_ops/_tools/headline_table.py": "a table of the package",
    "fused_ops/_tools/occupancy.py": "a table of the package",
    "fused_ops/_tools/doctor.py": "the driver's own file under /proc",
    "fused_ops/_tools/precompile.py": "the null device, to write to",
    "export/files/atomic.py": "what is written, and a copy made anew",
    "export/cli/exports.py": "the file that the command has just written",
    "bench/__main__.py": "the null device, to write to",
    "bench/environment.py": "the processor's own file under /proc",
    "bench/record.py": "what is written",
    "bench/correctness.py": "what is written, and the repository's own sources",
    "bench/correctness_worker.py": "the log of a worker that it has started",
    "bench/gpu.py": "the log that it writes, and a summary that it has written",
    "bench/prewarm.py": "the output of processes that it has started",
    "bench/sanitize.py": "the repository's own sources",
    "bench/tensorrt_probe.py": "an engine that it has built",
    "bench/wheels.py": "runs before there is a torch; it takes regular files of the folders that it makes",
    "bench/results_load.py": "archives, of files that are open already",
    "bench/results_format.py": "an archive that is written",
    "bench/demo/__main__.py": "what the demo has written",
    "bench/demo/deploy.py": "what the demo has written",
}
OPENING = ("open", "read_text", "read_bytes")


def _opens(source: str) -> list[str]:
    if not any(f"{name}(" in source for name in OPENING):
        return []
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    named = (f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, (ast.Attribute, ast.Name)))
    return sorted(name for name in named if name in OPENING)


def test_every_other_place_that_opens_a_file_has_a_reason() -> None:
    paths = [path for part in ("fused_ops", "export", "bench") for path in tracked(part)]
    found = {path.as_posix() for path in paths if _opens((ROOT / path).read_text())}
    ours = {path for path in found if path != "bench/files.py"}  # its read_text is the reader
    readers = {"bench/publish.py", "bench/figures.py"}  # which call that
    assert ours - readers == set(OTHERWISE)
