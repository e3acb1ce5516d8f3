"""What Inductor wrote during a run is kept with its results."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bench.inductor_sources import MARK, NAME, gather
from bench.results_format import FILES


def _graph(folder: Path, name: str, text: str, time: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    os.utime(folder / name, (time, time))


def test_graphs_with_triton_kernels_are_kept_once_the_oldest_first(tmp_path: Path) -> None:
    cache, target = tmp_path / "cache", tmp_path / NAME
    assert gather(cache, target) == 0
    assert not target.exists()
    _graph(cache / "ab", "later.py", f"x = {MARK}'later'", 200)
    _graph(cache / "cd", "first.py", f"x = {MARK}'first'", 100)
    _graph(cache / "ef", "again.py", f"x = {MARK}'first'", 300)
    _graph(cache / "ef", "other.py", "cpp_fused = 1", 50)
    assert gather(cache, target) == 2
    kept = [json.loads(line) for line in target.read_text().splitlines()]
    assert kept == [{"file": f"{n}.py", "source": f"x = {MARK}'{n}'"} for n in ("first", "later")]
    assert gather(cache, target, most=len(target.read_bytes()) - 1) == 1
    assert NAME in FILES
