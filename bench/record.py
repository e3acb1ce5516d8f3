"""One CSV row a measurement: appended and flushed at once, so that a run cut short keeps what it measured."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .environment import clocks, environment
from .goals import judge

KEY = ("op", "case", "dtype", "pass", "kind")
COLUMNS = (
    *("time", "gpu", "driver", "cuda", "cpu", "threads", "python", "torch", "triton", "commit"),
    *("clock_sm_mhz", "clock_mem_mhz", "temperature_c"),
    *KEY, "provider", "role", "shape", "configuration", "status", "reason", "error", "error_limit",
    *("method", "l2", "samples", "p20_us", "p50_us", "p80_us"),
    *("bytes", "flops", "gbps", "tflops", "limit_us", "percent_of_limit", "peak_bytes"),
    *("best_peer", "ratio_to_best_peer", "goal", "met"),
)  # fmt: skip
"""Values of the CSV columns. role is "ours" or "peer". kind: "kernel" (device time), "wall" (time of a call as Python sees it), "host", "startup",
"roofline". status: "ok", "wrong" (computes something else, not timed), "absent", "unsupported", "skipped", "error"."""


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of at least one sample, by linear interpolation."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """The p20, p50 and p80 of samples in seconds, as the CSV's microseconds."""
    micros = {f"p{q}_us": f"{quantile(samples, q / 100) * 1e6:.4g}" for q in (20, 50, 80)}
    return {"samples": len(samples), **micros}


def rates(seconds: float, moved: int, flops: int, limit_s: float | None) -> dict[str, Any]:
    """Achieved GB/s and TFLOP/s, and the share of the limit: the time the fewest bytes and FLOPs would need."""
    row: dict[str, Any] = {"bytes": moved, "flops": flops, "gbps": f"{moved / seconds / 1e9:.5g}"}
    row["tflops"] = f"{flops / seconds / 1e12:.5g}"
    if limit_s is not None:
        row |= {"limit_us": f"{limit_s * 1e6:.4g}", "percent_of_limit": f"{100 * limit_s / seconds:.4g}"}
    return row


def annotate(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the best peer of each measurement, the ratio to it in speed (more than 1 is faster), and the goals."""
    rows = [dict(row) for row in rows]
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row.get("status") == "ok" and row.get("role") == "peer":
            groups.setdefault(tuple(str(row[k]) for k in KEY), {})[row["provider"]] = float(row["p50_us"])
    for row in rows:
        peers = groups.get(tuple(str(row.get(k, "")) for k in KEY), {})
        if row.get("status") != "ok":
            continue
        if peers:
            best = min(peers, key=lambda name: peers[name])
            row["best_peer"] = best
            row["ratio_to_best_peer"] = f"{peers[best] / float(row['p50_us']):.4g}"
        if row["role"] == "ours":
            row["goal"], row["met"] = judge(row, peers)
    return rows


class Recorder:
    """Appends rows to a CSV file; path None records nothing. Rows of the run so far are in .rows."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = read(path) if path is not None and path.exists() else []

    def add(self, **values: Any) -> dict[str, Any]:
        """Write one row: the environment and clocks now, and values. A key that is no column is an error."""
        unknown = set(values) - set(COLUMNS)
        if unknown:
            raise KeyError(f"no such columns: {sorted(unknown)}")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = {**dict.fromkeys(COLUMNS, ""), "time": now, **environment(), **clocks(), **values}
        self.rows.append({k: str(v) for k, v in row.items()})
        if self.path is not None:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                os.fsync(file.fileno())
        return row

    def done(self, key: dict[str, str], errors_too: bool = False) -> bool:
        """Whether the last row with these values is final. A skip is tried again, and an error unless errors_too."""
        found = [r["status"] for r in self.rows if all(r.get(k) == v for k, v in key.items())]
        return bool(found) and found[-1] in ("ok", "wrong", "unsupported", *(("error",) if errors_too else ()))

    def finish(self) -> None:
        """Rewrite the file with ratios and goals, now that every peer has been measured."""
        if self.path is not None and self.rows:
            write(self.path, annotate(self.rows))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV written here. A last line cut short is dropped."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not set(KEY) <= set(reader.fieldnames):
            raise ValueError(f"{path}: no benchmark results: its columns are {reader.fieldnames}")
        return [row for row in reader if None not in row.values()]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace path by rows, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
