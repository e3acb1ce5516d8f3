"""The door to the command line: its help, and what it says when its packages are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, checked, run


def test_command_line_help(tmp_path: Path) -> None:
    out = checked(sys.executable, "-m", "fused_ops", "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "Usage" in out
    assert "--help" in out


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_command_line_without_its_packages_says_what_to_install(missing: str, tmp_path: Path) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import runpy; runpy.run_module('fused_ops', run_name='__main__')"
    done = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "pip install 'fused-ops[cli]'" in done.stderr
    assert missing in done.stderr
    assert "Traceback" not in done.stderr
