"""Two runs side by side: which measurements of ours became slower, and by how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .record import KEY, read

THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """One measurement in both runs. slower: B's median over A's, minus 1."""

    key: tuple[str, ...]
    provider: str
    role: str
    before_us: float
    after_us: float

    @property
    def slower(self) -> float:
        return self.after_us / self.before_us - 1.0


def results_file(path: Path) -> Path:
    """path itself, or results.csv in the folder it names."""
    found = path / "results.csv" if path.is_dir() else path
    if not found.is_file():
        raise FileNotFoundError(f"no results at {found}")
    return found


def machine(path: Path) -> str:
    """The GPU, or else the CPU, that the runs in a file used."""
    return ", ".join(sorted({row["gpu"] or row["cpu"] for row in read(path)}))


def compare(before: Path, after: Path) -> tuple[list[Change], list[str]]:
    """(every measurement that both runs have, the measurements of ours that only the first has or that no longer pass)."""
    a, b = (_times(read(results_file(p))) for p in (before, after))
    changes = [Change(k[:-1], k[-1], a[k][0], a[k][1], b[k][1]) for k in a if k in b]
    lost = [" ".join(k) for k in a if k not in b and a[k][0] == "ours"]
    return changes, lost


def _times(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], tuple[str, float]]:
    """key + provider -> (role, median); the last of equal measurements counts."""
    times: dict[tuple[str, ...], tuple[str, float]] = {}
    for row in rows:
        key = (*(row[k] for k in KEY), row["provider"])
        if row["status"] == "ok":
            times[key] = (row["role"], float(row["p50_us"]))
        else:
            times.pop(key, None)
    return times


def table(changes: list[Change], lost: list[str], threshold: float) -> tuple[str, bool]:
    """(the text to print, whether ours regressed by more than threshold anywhere)."""
    worst = sorted(changes, key=lambda c: -c.slower)
    lines = [f"{'change':>8}  {'before us':>11}  {'after us':>11}  measurement"]
    regressed = [c for c in worst if c.role == "ours" and c.slower > threshold]
    for c in worst:
        mark = "REGRESSION " if c in regressed else ""
        if mark or abs(c.slower) > threshold:
            lines.append(f"{c.slower:>+8.1%}  {c.before_us:>11.4g}  {c.after_us:>11.4g}  {mark}{' '.join(c.key)} {c.provider}")
    lines += [f"{'':>8}  {'':>11}  {'missing':>11}  {name}" for name in lost]
    lines.append(
        f"{len(changes)} measurements in both; {len(regressed)} of ours slower by more than {threshold:.0%}; {len(lost)} missing"
    )
    return "\n".join(lines), bool(regressed)
