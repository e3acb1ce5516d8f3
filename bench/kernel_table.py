"""What the headline rows' kernels cost before and after a change, and Liger's beside them, as Markdown: compiled, not run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fused_ops._tools.forecast import GPUS
from fused_ops._tools.forecast.counted import Counted
from fused_ops._tools.forecast.gpus import Gpu
from fused_ops._tools.forecast.launched import forecast_launches
from fused_ops._tools.headline import SXM, Row, headline_rows
from fused_ops._tools.headline_table import HeadlineTable, Key, count, count_launches, load, save, table_of
from fused_ops._tools.occupancy import VERSIONS

HEADS = ("row", "kernel", "regs", "spill", "an SM", "ins/el", "KB/SM", "bar/row", "us", "limit", "bound by")
FASTER = 0.02  # of the time: what a forecast calls faster
SAME = 0.005  # relative difference of two figures that is none


def kernel_table(
    before: str, after: Path | None, save_to: Path | None, peers: Path | None, save_peers: Path | None, gpu: str, only: str,
    jobs: int | None,
) -> str:  # fmt: skip
    """The table of `python -m bench kernels`. Raises ValueError for what it does not know, RuntimeError where a kernel does not
    compile."""
    if gpu not in GPUS:
        raise ValueError(f"--gpu: got {gpu}, allowed: {', '.join(GPUS)}")
    rows = [row for row in headline_rows() if re.search(only, "-".join(row.key))]
    if not rows:
        raise ValueError(f"--only: no headline row matches {only!r}")
    if after is not None:
        now, triton = _table(after), "unknown"
    else:
        now, triton = count(rows, jobs=jobs)
    if save_to is not None:
        save(now, save_to)
    was = _table(Path(before)) if before else load(table_of(triton)) if after is None else {}
    liger: HeadlineTable = {}
    if peers is not None:
        from .peer_launches import add_path, liger_launches

        add_path(peers)
        liger, triton = count_launches(liger_launches(rows), SXM, jobs)
        if save_peers is not None:
            save(liger, save_peers)
    return "\n".join(_text(rows, was, now, liger, GPUS[gpu], triton))


def committed(gpu: str, folder: Path) -> str:
    """The same from committed tables alone, a section for each Triton: folder's kernels-before-<version>.csv and, where there is
    one, kernels-liger-<version>.csv, beside what the kernels cost now. Raises ValueError for what it does not know."""
    if gpu not in GPUS:
        raise ValueError(f"--gpu: got {gpu}, allowed: {', '.join(GPUS)}")
    parts = []
    for version in VERSIONS:
        was, now = load(folder / f"kernels-before-{version}.csv"), load(table_of(version))
        if was and now:
            liger = load(folder / f"kernels-liger-{version}.csv")
            parts.append("\n".join(_text(headline_rows(), was, now, liger, GPUS[gpu], version)))
    return "\n\n".join(parts)


def _table(path: Path) -> HeadlineTable:
    if not path.exists():
        raise ValueError(f"{path}: no such table")
    return load(path)


def _text(
    rows: Sequence[Row], was: HeadlineTable, now: HeadlineTable, liger: HeadlineTable, gpu: Gpu, triton: str
) -> list[str]:
    lines = [
        f"Triton {triton}, sm_90; times and limits are forecasts for {gpu.name}. An arrow: before -> after.", "",
        "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS),
    ]  # fmt: skip
    slower = []
    seen: set[Key] = set()
    for row in rows:
        if row.key in seen or row.key not in now:
            continue
        seen.add(row.key)
        lines += _row(row, "", was.get(row.key, []), now[row.key], gpu)
        if row.key in liger:
            lines += _row(row, "Liger: ", [], liger[row.key], gpu)
            ours, theirs = (forecast_launches(part[row.key], gpu).seconds for part in (now, liger))
            if theirs < (1 - FASTER) * ours:
                slower.append(f"- {_name(row)}: Liger {theirs * 1e6:.1f} us, ours {ours * 1e6:.1f} us")
    if liger:
        lines += ["", "Liger's forecast is faster on:" if slower else "Liger's forecast is faster on no row.", *slower]
    return lines


def _name(row: Row) -> str:
    return f"{row.op.name} {row.case.name} {row.pass_}"


def _row(row: Row, who: str, was: Sequence[Counted], now: Sequence[Counted], gpu: Gpu) -> list[str]:
    """A line for the row, and one for each of our kernels where there are several; ATen's count in the row's time."""
    found = forecast_launches(now, gpu)
    earlier = forecast_launches(was, gpu) if was else found
    least = row.work()[0] / gpu.copy
    if row.op.roles.multiplies:
        least = max(least, row.work()[1] / gpu.rates[row.case.dtype.itemsize])
    shares = [f"{100 * least / part.seconds:.0f}%" for part in (earlier, found)]
    own = [one for one in now if not one.is_aten]
    before = [one for one in was if not one.is_aten]
    if len(before) != len(own):
        before = own if not was else [Counted("", programs_per_sm=0)] * len(own)
    ends = [_arrow(earlier.seconds * 1e6, found.seconds * 1e6), shares[1] if shares[0] == shares[1] else " -> ".join(shares)]
    lines = []
    if len(now) > 1:
        lines.append(_line([f"{who}{_name(row)}", f"{len(now)} kernels", *[""] * 6, *ends, found.binding]))
    times = [[part.seconds * 1e6 for one, part in zip(launches, whole.launches) if not one.is_aten]
             for launches, whole in ((was, earlier), (now, found))]  # fmt: skip
    bound = [part.binding for one, part in zip(now, found.launches) if not one.is_aten]
    for n, (old, new) in enumerate(zip(before, own)):
        cells = [
            "" if len(now) > 1 else f"{who}{_name(row)}",
            new.kernel.strip("_").removesuffix("_kernel"),
            *_figures(old, new, gpu),
        ]
        if len(now) > 1:
            now_us = times[1][n]
            ends = [_arrow(times[0][n], now_us) if len(times[0]) == len(own) else f"{now_us:.4g}", ""]
        lines.append(_line([*cells, *ends, bound[n]]))
    return lines


def _figures(old: Counted, new: Counted, gpu: Gpu) -> list[str]:
    pairs = [
        (one.registers, one.spill_bytes, one.programs_per_sm, one.instructions_per_element, one.in_flight_per_sm(gpu) / 1024,
         one.barriers_per_row)
        for one in (old, new)
    ]  # fmt: skip
    return [_arrow(a, b) if old.kernel else f"{b:.4g}" for a, b in zip(*pairs)]


def _arrow(before: float, after: float) -> str:
    if abs(before - after) <= SAME * max(abs(before), abs(after)):
        return f"{after:.4g}"
    return f"{before:.4g} -> {after:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
