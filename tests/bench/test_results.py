"""What bench/results holds is real: measured, on a named machine, from a clean commit, with a report of the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.record import COLUMNS, read

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
FOLDERS = sorted(p for p in RESULTS.iterdir() if p.is_dir())


def test_there_are_results() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_results_are_measurements(folder: Path) -> None:
    rows = read(folder / "results.csv")
    timed = [r for r in rows if r["status"] == "ok"]
    assert timed
    for row in rows:
        assert list(row) == list(COLUMNS)
        assert "SYNTHETIC" not in str(row)
        assert row["commit"].isalnum(), "measured from a checkout with changes"
        assert (row["gpu"] == "") is (folder.name == "cpu")
    for row in timed:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert int(row["samples"]) >= 1
    assert timed[0]["commit"] in (folder / "report.html").read_text()
