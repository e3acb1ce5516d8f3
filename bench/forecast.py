"""The forecast of every headline row, written down before a run; and, after it, how far the measured times are from it."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_ops._tools.forecast import GPUS, MODEL_VERSION, Forecast, forecast, kernels_hash, variant_of
from fused_ops._tools.forecast.launched import forecast_launches
from fused_ops._tools.headline_table import HeadlineTable, load, table_of

from .files import lines
from .headline import headline_tasks
from .record import KEY
from .results_format import write_whole
from .tasks import Task

FORECAST_COLUMNS = (*KEY, "forecast_us", "binding", "bytes", "flops", "model", "kernels")
RESIDUAL_COLUMNS = (*KEY, "forecast_us", "measured_us", "ratio", "binding", "model", "kernels")
NEXT = "forecast-next.csv"
"""The forecast of the run after the one that is filed; publish --replace makes it the filed run's."""
COUNTED_BY = "3.7"
"""The Triton whose committed counts forecast."""
BAND = (0.8, 1.25)
"""measured / forecast of a row that the model explains."""


def forecast_of(task: Task, gpu: str) -> Forecast:
    """The forecast for ours on a task, from the committed counts of its launches. gpu: a name in GPUS."""
    launches = _counted().get((task.spec.name, task.case.name, str(task.case.dtype).removeprefix("torch."), task.pass_))
    if launches:
        return forecast_launches(launches, GPUS[gpu], task.spec.name, task.pass_, task.kind == "wall")
    return forecast(
        task.spec.name, task.case.shape, task.case.dtype.itemsize, task.pass_, GPUS[gpu],
        kind=task.kind, activation=variant_of(task.case.name), work=task.work(),
    )  # fmt: skip


@functools.cache
def _counted() -> HeadlineTable:
    return load(table_of(COUNTED_BY))


def forecast_rows(gpu: str) -> list[dict[str, str]]:
    """One row a headline row. gpu: a name in GPUS."""
    rows = []
    for task in headline_tasks():
        found, (moved, flops) = forecast_of(task, gpu), task.work()
        rows.append(task.key | {
            "forecast_us": f"{found.seconds * 1e6:.4g}", "binding": found.binding, "bytes": str(moved), "flops": str(flops),
            "model": str(MODEL_VERSION), "kernels": kernels_hash(),
        })  # fmt: skip
    return rows


def write_forecast(folder: Path, gpu: str) -> Path:
    """Write folder/forecast.csv; beside a run that is filed, whose forecast stays, NEXT. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (NEXT if (folder / "residuals.csv").exists() else "forecast.csv")
    write_whole(path, table(FORECAST_COLUMNS, forecast_rows(gpu)).encode())
    return path


def read_forecast(path: Path) -> list[dict[str, str]]:
    """The rows of a forecast.csv. Raises ValueError where it is none."""
    reader = csv.DictReader(lines(path))
    if tuple(reader.fieldnames or ()) != FORECAST_COLUMNS:
        raise ValueError(f"{path}: no forecast: its columns are {reader.fieldnames}, not {list(FORECAST_COLUMNS)}")
    return list(reader)


def residuals(forecasts: Iterable[Mapping[str, str]], measured: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """A row for each forecast that was measured. ratio: measured / forecast time, 1 where the forecast was right."""
    times = {
        tuple(row[k] for k in KEY): float(row["p50_us"])
        for row in measured
        if row["provider"] == "ours" and row["status"] == "ok"
    }
    found = []
    for row in forecasts:
        time = times.get(tuple(row[k] for k in KEY))
        if time is not None:
            ratio = time / float(row["forecast_us"])
            kept = {k: row[k] for k in RESIDUAL_COLUMNS if k in row}
            found.append(kept | {"measured_us": f"{time:.4g}", "ratio": f"{ratio:.3f}"})
    return found


def said_of(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of Markdown on residuals: how many are within the band, by how much each op is off, and the worst."""
    if not rows:
        return []
    ratios = [float(row["ratio"]) for row in rows]
    inside = sum(BAND[0] <= ratio <= BAND[1] for ratio in ratios)
    lines = [f"{inside} of {len(rows)} forecasts within {BAND[0]:g} to {BAND[1]:g} of the measured time.", ""]
    lines += ["| op | rows | measured / forecast (geometric mean) |", "|---|---|---|"]
    for op in dict.fromkeys(row["op"] for row in rows):
        logs = [math.log(float(row["ratio"])) for row in rows if row["op"] == op]
        lines.append(f"| {op} | {len(logs)} | {math.exp(sum(logs) / len(logs)):.2f} |")
    worst = sorted(rows, key=lambda row: -abs(math.log(float(row["ratio"]))))[:10]
    lines += ["", "| furthest off | forecast us | measured us | ratio | binding |", "|---|---|---|---|---|"]
    for row in worst:
        name = " ".join(row[k] for k in KEY)
        lines.append(f"| {name} | {row['forecast_us']} | {row['measured_us']} | {row['ratio']} | {row['binding']} |")
    return lines


def table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
