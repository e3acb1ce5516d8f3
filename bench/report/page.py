"""report.html: one page that holds its pictures, the goals met and missed, and what was wrong, absent or skipped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from . import plots
from .frame import DTYPE_ORDER, PASS_ORDER, limits, load, matmul_ops, ordered, row_ops, timed, title_of
from .style import plt

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; display: block; margin: 1em 0 } h2 { border-bottom: 1px solid #ccc; margin-top: 2em }
table { border-collapse: collapse; font-size: 13px } td, th { border: 1px solid #ddd; padding: 3px 8px; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } .yes { background: #d9f2dd } .no { background: #f8d7d7 }
.open { background: #f4f0d8 } .note { color: #555 }
"""


def pictures(frame: pd.DataFrame) -> Iterator[tuple[str, str, Figure | None]]:
    """(section, file name, figure) of everything that the rows can show."""
    rows, products = row_ops(frame), matmul_ops(frame)
    for op in dict.fromkeys(rows["op"]):
        for dtype in ordered(rows[rows["op"] == op]["dtype"], DTYPE_ORDER):
            yield "Speed against row length", f"speed_{op}_{dtype}", plots.speed_against_length(frame, op, dtype)
    for op, variant in dict.fromkeys(zip(products["op"], products["variant"])):
        for dtype in ordered(products["dtype"], DTYPE_ORDER):
            for pass_ in ordered(products["pass"], PASS_ORDER):
                name = f"tflops_{op}_{variant}_{pass_}_{dtype}"
                yield "Matrix products", name, plots.matmul_speed(frame, op, dtype, pass_, variant)
    for kind in ("kernel", "wall"):
        chosen = timed(frame, kind)
        chosen = chosen[chosen["op"] != "model"]
        for op, variant, dtype, pass_ in dict.fromkeys(zip(*(chosen[c] for c in ("op", "variant", "dtype", "pass")))):
            name = "_".join(part for part in ("ratio", kind, op, variant, pass_, dtype) if part)
            yield "Against each peer", name, plots.ratios(frame, op, dtype, pass_, variant, kind)
    for dtype in ordered(frame["dtype"], DTYPE_ORDER):
        yield "Roofline", f"roofline_{dtype}", plots.roofline(frame, dtype)
    for kind, unit in (("kernel", "ms"), ("wall", "ms"), ("cpu", "ms")):
        yield "Whole models", f"models_{kind}", plots.times(frame, kind, "model", unit)
    for op in dict.fromkeys(timed(frame, "host")["op"]):
        yield "Host time of a call", f"host_{op}", plots.times(frame, "host", op, "us")
    yield "Paid once", "startup", plots.times(frame, "startup", "startup", "s")


def goals_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a goal and measurement of ours: what was wanted, what was measured, met or not."""
    rows = []
    for _, row in frame[frame["goal"].astype(bool) & (frame["status"] == "ok")].iterrows():
        for goal, met in zip(str(row["goal"]).split("; "), str(row["met"]).split("; ")):
            got = (
                f"{row['percent_of_limit']:.0f}%" if "limit" in goal else f"{row['ratio_to_best_peer']:.2f}x {row['best_peer']}"
            )
            measured = " ".join((row["op"], row["case"], row["dtype"], row["pass"], row["kind"]))
            rows.append({"measurement": measured, "goal": goal, "measured": "" if met == "open" else got, "met": met})
    return pd.DataFrame(rows, columns=["measurement", "goal", "measured", "met"])


def _table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in frame.columns)
    body = []
    for _, row in frame.iterrows():
        cells = []
        for column, value in row.items():
            mark = str(value) if column == "met" else "number" if isinstance(value, float) else ""
            shown = (
                ""
                if isinstance(value, float) and pd.isna(value)
                else f"{value:.4g}"
                if isinstance(value, float)
                else str(value)
            )
            cells.append(f'<td class="{html.escape(mark)}">{html.escape(shown)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def write_report(csv: Path, folder: Path) -> Path:
    """Draw the CSV into folder/report.html and folder/*.png. Returns the page's path."""
    frame = load(csv)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>fused-ops benchmark</h1><p>{html.escape(title_of(frame))}</p>"]
    if not frame["gpu"].astype(bool).any():
        parts.append(
            "<p><b>No GPU: nothing here says anything about the kernels' speed.</b> Host time, startup and CPU only.</p>"
        )
    if measured := limits(frame):
        said = ", ".join(f"{k}: {v:.0f} {'GB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in measured.items())
        parts.append(f"<p>Limits measured in this run: {html.escape(said)}.</p>")
    goals = goals_table(frame)
    if not goals.empty:
        counts = goals["met"].value_counts()
        parts.append(
            f"<h2>Goals</h2><p>{', '.join(f'{n} {k}' for k, n in counts.items())} (open: a named peer was not measured)</p>"
        )
        parts.append(_table(goals))
    section = ""
    for heading, name, figure in pictures(frame):
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        (folder / f"{name.replace('+', '_')}.png").write_bytes(buffer.getvalue())
        if heading != section:
            section = heading
            parts.append(f"<h2>{html.escape(heading)}</h2>")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    failed = frame[frame["status"].isin(["wrong", "error", "skipped", "absent"])]
    if not failed.empty:
        columns = ["status", "provider", "op", "case", "dtype", "pass", "reason"]
        parts.append("<h2>Wrong, absent, failed, skipped</h2><p>A provider that computes something else is not timed.</p>")
        parts.append(_table(failed[columns].sort_values(["status", "provider"])))
    wanted = [
        "op",
        "case",
        "dtype",
        "pass",
        "kind",
        "provider",
        "p20_us",
        "p50_us",
        "p80_us",
        "gbps",
        "tflops",
        "percent_of_limit",
    ]
    parts.append(
        "<h2>All measurements</h2>"
        + _table(frame[frame["status"] == "ok"][[*wanted, "ratio_to_best_peer", "error", "peak_bytes", "configuration"]])
    )
    page = folder / "report.html"
    page.write_text(
        f"<!doctype html><meta charset='utf-8'><title>fused-ops benchmark</title><style>{STYLE}</style>{''.join(parts)}"
    )
    return page
