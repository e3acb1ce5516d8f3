"""One CSV row a measurement: appended and flushed at once, so that a run cut short keeps what it measured."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .environment import clocks, environment
from .files import lines
from .goals import judge
from .roofline import Roofline

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
"roofline". status: "ok", "wrong" (computes something else, not timed), "absent", "unsupported", "skipped", "error". reason: why the status is not "ok",
or for one that is, why there is no ratio to some peer. method: "graph" and "events" for kernel times, "loop" for wall times: never compared."""


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
    """The rows with the best peer of each measurement, the ratio to it in speed (more than 1 is faster), and the goals.

    Only what was measured on one machine by one method is compared: a peer that was timed otherwise gives no ratio, `reason`
    names it, and a goal that depends on it is open. A percentage of the limit is to the roofline nearest in time.
    """
    rows = [dict(row) for row in rows]
    limits = [row for row in rows if row.get("kind") == "roofline"]
    peers: dict[tuple[str, ...], dict[str, tuple[float, str]]] = {}
    for row in rows:
        if row.get("status") == "ok" and row.get("role") == "peer" and row.get("kind") != "roofline":
            peers.setdefault(_group(row), {})[row["provider"]] = float(row["p50_us"]), str(row.get("method", ""))
    for row in rows:
        if row.get("status") == "ok" and row.get("kind") != "roofline":
            _compare(row, peers.get(_group(row), {}))
            _hold_to_limit(row, limits)
            if row["role"] == "ours":
                row["goal"], row["met"] = _judge(row, peers.get(_group(row), {}))
    return rows


def _group(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What the rows of one comparison have in common: the machine and the measurement."""
    return str(row.get("gpu") or row.get("cpu") or ""), *(str(row.get(k, "")) for k in KEY)


def _compare(row: dict[str, Any], peers: Mapping[str, tuple[float, str]]) -> None:
    """Best peer, ratio, and which peers are left out of it and why; what an earlier annotation said is replaced."""
    method = str(row.get("method", ""))
    row |= {name: "" for name in ("best_peer", "ratio_to_best_peer", "reason") if name in row}
    alike = {name: p50 for name, (p50, by) in peers.items() if by == method}
    if alike:
        row["best_peer"] = best = min(alike, key=lambda name: alike[name])
        row["ratio_to_best_peer"] = f"{alike[best] / float(row['p50_us']):.4g}"
    apart = [f"{name} ({by or 'unknown'})" for name, (_, by) in peers.items() if by != method]
    if apart:
        row["reason"] = f"timed by {method or 'unknown'}, so no ratio to {', '.join(apart)}"


def _hold_to_limit(row: dict[str, Any], limits: Sequence[Mapping[str, Any]]) -> None:
    """limits: the rows of the roofline."""
    if row["kind"] == "kernel" and row.get("bytes"):
        roofline = Roofline.from_rows(limits, str(row.get("gpu", "")), str(row.get("time", "")))
        if roofline is not None:
            moved, flops = int(row["bytes"]), int(row["flops"])
            limit = roofline.least_seconds(moved, flops, str(row["op"]), str(row["dtype"]))
            held = rates(float(row["p50_us"]) * 1e-6, moved, flops, limit)
            row |= {name: held[name] for name in ("limit_us", "percent_of_limit")}


def _judge(row: Mapping[str, Any], peers: Mapping[str, tuple[float, str]]) -> tuple[str, str]:
    """Goals and verdicts: open where a peer timed by another method could change the verdict, however fast it is."""
    alike = {name: p50 for name, (p50, by) in peers.items() if by == str(row.get("method", ""))}
    goals, verdicts = judge(row, alike)
    _, at_worst = judge(row, {name: alike.get(name, 0.0) for name in peers})
    pairs = zip(verdicts.split("; "), at_worst.split("; "))
    return goals, "; ".join(verdict if verdict == worst else "open" for verdict, worst in pairs)


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
        """Whether the last row of this GPU with these values is final. A skip is tried again, an error unless errors_too."""
        key = {"gpu": environment()["gpu"], **key}
        found = [r["status"] for r in self.rows if all(r.get(k) == v for k, v in key.items())]
        return bool(found) and found[-1] in ("ok", "wrong", "unsupported", *(("error",) if errors_too else ()))

    def finish(self) -> None:
        """Rewrite the file with ratios and goals, now that every peer has been measured."""
        if self.path is not None and self.rows:
            write(self.path, annotate(self.rows))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV written here. A last line cut short is dropped. Raises OSError and ValueError, as files.read_text."""
    reader = csv.DictReader(lines(path))
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
