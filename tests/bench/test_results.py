"""What bench/results holds is real: measured, on a named machine, from a clean commit, with a report of the same rows; and
forecasts, which were there first."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.environment import gpu_folder
from bench.forecast import FORECAST_COLUMNS, RESIDUAL_COLUMNS, forecast_rows, read_forecast, residuals, table
from bench.record import COLUMNS, KEY, read
from bench.tasks import all_tasks
from fused_ops._tools.forecast import GPUS, MODEL_VERSION, kernels_hash

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
FOLDERS = sorted(p.parent for p in RESULTS.glob("*/results.csv"))
FORECASTS = sorted(p.parent for p in RESULTS.glob("*/forecast.csv"))


def test_there_are_results_and_forecasts() -> None:
    assert FOLDERS
    assert {folder.name for folder in FORECASTS} == set(GPUS)
    assert {p for p in RESULTS.iterdir() if p.is_dir()} == {*FOLDERS, *FORECASTS}


@pytest.mark.parametrize("folder", FORECASTS, ids=lambda p: p.name)
def test_forecasts_are_the_models(folder: Path) -> None:
    """Each is of a case there is. What the present model and kernels give is what is written, unless one of them is later."""
    rows = read_forecast(folder / "forecast.csv")
    known = {tuple(task.key.values()) for task in all_tasks()}
    assert rows
    assert {tuple(row[k] for k in KEY) for row in rows} <= known
    assert all(float(row["forecast_us"]) > 0 and row["binding"] for row in rows)
    assert {(row["model"], row["kernels"]) for row in rows} == {(rows[0]["model"], rows[0]["kernels"])}
    now = {tuple(row[k] for k in KEY): row for row in forecast_rows(folder.name)}
    if (rows[0]["model"], rows[0]["kernels"]) == (str(MODEL_VERSION), kernels_hash()):
        assert [now[tuple(row[k] for k in KEY)] for row in rows] == rows
    assert list(FORECAST_COLUMNS) == list(rows[0])


def test_published_runs_are_of_their_folders_gpu() -> None:
    """A folder of a GPU's results was published, and holds that GPU's alone; its residuals are those of its forecast."""
    assert [folder for folder in FOLDERS if not (folder / "machine.json").exists()] == [RESULTS / "cpu"]
    for folder in FOLDERS:
        rows = read(folder / "results.csv")
        assert {gpu_folder(row["gpu"]) for row in rows} == {folder.name}
        if (folder / "residuals.csv").exists():
            found = residuals(read_forecast(folder / "forecast.csv"), rows)
            assert (folder / "residuals.csv").read_text() == table(RESIDUAL_COLUMNS, found)


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
