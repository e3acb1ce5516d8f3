"""Fit a GPU's coefficients to what was measured: least squares of log(measured / forecast), within bounds, numpy alone.

Never by case: the coefficients are of the GPU, and rows that were held out say whether they forecast better than before.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fused_ops._tools.forecast import GPUS
from fused_ops._tools.forecast.counted import Counted
from fused_ops._tools.forecast.gpus import FITTED, Gpu
from fused_ops._tools.forecast.launched import forecast_launches
from fused_ops._tools.headline_table import HeadlineTable, load

from .files import lines
from .forecast import BAND

BOUNDS: Mapping[str, tuple[float, float]] = {
    "latency": (300e-9, 2000e-9), "issue_share": (0.4, 1.0), "l2_share": (0.2, 1.0), "norm": (2.0, 16.0),
    "launch": (0.5e-6, 5e-6), "host": (0.5, 10.0),
}  # fmt: skip
FOLDS = 4
ROUNDS = 200
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Measured(NamedTuple):
    """A row: what it launched, and the seconds that it took."""

    op: str
    case: str
    pass_: str
    kind: str
    launches: tuple[Counted, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """Coefficients before and after; errors are root mean squares of log(measured / forecast).

    before, after: over the rows that were fitted; held: over rows held out, fold by fold. inside, held_inside: rows within the
    band; inside_before: with the coefficients as they were.
    """

    start: Gpu
    fitted: Gpu
    before: float
    after: float
    held: float
    inside_before: int
    inside: int
    held_inside: int
    rows: int

    @property
    def better(self) -> bool:
        """Whether the fit forecasts rows better that it has not seen: a smaller error, and no fewer within the band."""
        return self.held < self.before and self.held_inside >= self.inside_before


def measured_rows(folder: Path) -> list[Measured]:
    """The rows of folder/residuals.csv that folder/counts.csv has the launches of. Raises OSError or ValueError."""
    table: HeadlineTable = load(folder / "counts.csv")
    if not table:
        raise ValueError(f"{folder / 'counts.csv'}: no counts of the kernels that were measured")
    found = []
    for row in csv.DictReader(lines(folder / "residuals.csv")):
        launches = table.get((row["op"], row["case"], _DTYPES.get(row["dtype"], row["dtype"]), row["pass"]))
        if launches:
            seconds = float(row["measured_us"]) * 1e-6
            found.append(Measured(row["op"], row["case"], row["pass"], row["kind"], tuple(launches), seconds))
    return found


def errors(rows: Sequence[Measured], gpu: Gpu) -> np.ndarray:
    """log(measured / forecast) of each row."""
    times = [
        forecast_launches(row.launches, gpu, row.op, row.pass_, row.kind == "wall").seconds for row in rows
    ]  # fmt: skip
    return np.log(np.array([row.seconds for row in rows]) / np.array(times))


def fit(rows: Sequence[Measured], gpu: Gpu, names: Sequence[str] = FITTED) -> Gpu:
    """The coefficients that forecast the rows best: Gauss-Newton steps in the logarithms of the coefficients, damped and bounded.

    A coefficient that no row depends on keeps its value.
    """
    low, high = (np.log([BOUNDS[name][i] for name in names]) for i in (0, 1))

    def at(x: np.ndarray) -> Gpu:
        return dataclasses.replace(gpu, **dict(zip(names, map(float, np.exp(x)))))

    def cost(x: np.ndarray) -> float:
        return float(np.sum(errors(rows, at(x)) ** 2))

    x = np.clip(np.log([getattr(gpu, name) for name in names]), low, high)
    best, damping = cost(x), 1e-2
    for _ in range(ROUNDS):
        now = errors(rows, at(x))
        slope = _slope(lambda y: errors(rows, at(y)), x, now)
        normal = slope.T @ slope
        step = np.linalg.solve(normal + damping * (np.diag(np.diag(normal)) + 1e-9 * np.eye(len(x))), -slope.T @ now)
        new = np.clip(x + np.clip(step, -0.5, 0.5), low, high)
        if (value := cost(new)) < best - 1e-12:
            x, best, damping = new, value, max(damping / 3, 1e-6)
        elif (damping := damping * 4) > 1e6:
            break
    return at(x)


def _slope(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, now: np.ndarray) -> np.ndarray:
    columns = []
    for i in range(len(x)):
        moved = x.copy()
        moved[i] += 1e-4
        columns.append((function(moved) - now) / 1e-4)
    return np.stack(columns, 1)


def evaluate(rows: Sequence[Measured], gpu: Gpu, names: Sequence[str] = FITTED) -> Fit:
    """Fit all rows, and say by cross-validation whether it helps: each fold of rows is forecast by a fit of the others.

    Rows of one shape stay in one fold, so that a backward is not forecast from its forward.
    """
    shapes = sorted({_shape(row) for row in rows})
    held: list[np.ndarray] = []
    for k in range(min(FOLDS, len(shapes))):
        out = set(shapes[k::FOLDS])
        fitted = fit([row for row in rows if _shape(row) not in out], gpu, names)
        held.append(errors([row for row in rows if _shape(row) in out], fitted))
    fitted = fit(rows, gpu, names)
    before, after, unseen = errors(rows, gpu), errors(rows, fitted), np.concatenate(held)
    return Fit(
        gpu, fitted, _rms(before), _rms(after), _rms(unseen), _inside(before), _inside(after), _inside(unseen), len(rows)
    )  # fmt: skip


def _shape(row: Measured) -> tuple[str, str]:
    return row.op, row.case.rpartition("_")[0] or row.case


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _inside(x: np.ndarray) -> int:
    return int(np.sum((np.exp(x) >= BAND[0]) & (np.exp(x) <= BAND[1])))


def said(found: Fit) -> str:
    """The outcome, as text."""
    lines_ = [f"{found.rows} measured rows of {found.start.name}"]
    for name in FITTED:
        value = getattr(found.fitted, name)
        bound = ", at its bound: the model lacks something" if np.any(np.isclose(value, BOUNDS[name])) else ""
        lines_.append(f"  {name:<12} {getattr(found.start, name):.4g} -> {value:.4g}{bound}")
    lines_ += [
        f"error (rms of log ratio): {found.before:.3f} -> {found.after:.3f}, of rows held out {found.held:.3f}",
        f"within {BAND[0]:g} to {BAND[1]:g}: {found.inside_before} -> {found.inside}, of rows held out {found.held_inside}",
        "better on rows held out" if found.better else "no better on rows held out: keep the coefficients as they are",
    ]
    return "\n".join(lines_)


def fit_folder(folder: Path, names: Sequence[str] = FITTED) -> Fit:
    """The fit of bench/results/<gpu>. Raises OSError, or ValueError for a GPU without coefficients or an unknown coefficient."""
    if unknown := set(names) - set(FITTED):
        raise ValueError(f"--only: got {', '.join(sorted(unknown))}, allowed: {', '.join(FITTED)}")
    if folder.name not in GPUS:
        raise ValueError(f"{folder.name}: no such GPU, there are {', '.join(GPUS)}")
    return evaluate(measured_rows(folder), GPUS[folder.name], names)
