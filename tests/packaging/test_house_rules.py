"""Rules that hold over all sources: imports run one way, and no file names the machine it was written on."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT
from tests.packaging.sources import PARTS, files, imported_names

# fused_ops/__main__.py is the command line's door, which opens upwards by design, and only inside a function.
DOOR = Path("fused_ops/__main__.py")


def _part_of(module: str) -> str | None:
    """The part of the house a module belongs to, or None where it is somebody else's."""
    parts = module.split(".")
    if parts[0] == "bench":
        return "bench"
    if parts[0] != "fused_ops":
        return None
    return parts[1] if parts[1:2] and parts[1] in ("kernels", "export") else "fused_ops"


def _upward(path: Path, source: str, part: str) -> list[str]:
    return sorted(m for m in imported_names(path, source) if (p := _part_of(m)) and PARTS.index(p) > PARTS.index(part))


@pytest.mark.parametrize("part", PARTS[:-1])
def test_imports_run_one_way(part: str) -> None:
    sources = files(part)
    assert sources
    wrong = {str(p): up for p in sources if p != DOOR and (up := _upward(p, (ROOT / p).read_text(), part))}
    assert not wrong


def test_only_the_command_line_opens_upwards_and_lazily() -> None:
    tree = ast.parse((ROOT / DOOR).read_text())
    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not _upward(DOOR, ast.unparse(ast.Module(top, [])), "fused_ops")
    assert _upward(DOOR, (ROOT / DOOR).read_text(), "fused_ops") == ["fused_ops.export.cli.app"]


def test_kernels_never_import_torch_or_their_callers() -> None:
    for path in files("kernels"):
        imported = imported_names(path, (ROOT / path).read_text())
        assert not [m for m in imported if m.split(".")[0] == "torch"], path
        assert not [m for m in imported if _part_of(m) not in (None, "kernels")], path


@pytest.mark.parametrize(
    ("path", "source", "part"),
    [
        ("kernels/a.py", "from ..softmax import fused_softmax", "kernels"),
        ("fused_ops/a.py", "def f():\n    from .export import verify", "fused_ops"),
        ("fused_ops/_fuse/a.py", "from ..export.onnx import export_onnx", "fused_ops"),
        ("fused_ops/a.py", "import fused_ops.export.files.atomic", "fused_ops"),
        ("export/cli/a.py", "import bench.report", "export"),
    ],
)
def test_an_upward_import_is_found(path: str, source: str, part: str) -> None:
    """The check itself, on imports it must refuse."""
    assert _upward(Path(path), source, part)


# Assembled here, so that this file does not name what it looks for.
PLACES = ("home", "root", "work", "tmp", "opt", "Users", "mnt")
MACHINE_PATH = re.compile(r"(?<![\w.~$}:/-])/(?:" + "|".join(PLACES) + r")/\w")


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_a_path_of_a_machine() -> None:
    found = []
    for path in _tracked():
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {line.strip()}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert not found


@pytest.mark.parametrize("place", PLACES)
def test_a_machine_path_is_found(place: str) -> None:
    assert MACHINE_PATH.search(f'open("/{place}/somebody/model.onnx")')
    assert not MACHINE_PATH.search(f"docs/{place}/page and https://example.org/{place}/page")


# Words that had several meanings; what to say instead is in CONTRIBUTING.md.
RETIRED_WORDS = {"facts", "plain", "short_way"}


def _identifiers(source: str) -> set[str]:
    """Every name that a source defines or uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                found.add(value)
    return found


def _retired(source: str) -> list[str]:
    return sorted(
        name for name in _identifiers(source) if any(re.search(rf"(^|_){word}(_|$)", name.lower()) for word in RETIRED_WORDS)
    )


@pytest.mark.parametrize("part", [*PARTS, "tests"])
def test_no_identifier_uses_a_retired_word(part: str) -> None:
    assert not {str(path): names for path in files(part) if (names := _retired((ROOT / path).read_text()))}


@pytest.mark.parametrize("source", ["def linear_plain(x): ...", "facts = 1", "a.device_facts(x)", "from a import short_way"])
def test_a_retired_word_is_found(source: str) -> None:
    assert _retired(source)
