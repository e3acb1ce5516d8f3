"""The picture of forecast against measured time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ..forecast import BAND
from .style import legend_below, plt


def residual_picture(rows: Sequence[Mapping[str, str]], title: str) -> Figure | None:
    """Measured against forecast time, both logarithmic, a marker an op, and the band in which a forecast counts as right."""
    if not rows:
        return None
    figure, panel = plt.subplots(figsize=(7.0, 6.2))
    times = [float(row[name]) for row in rows for name in ("forecast_us", "measured_us")]
    low, high = min(times) / 1.6, max(times) * 1.6
    panel.fill_between([low, high], [low * BAND[0], high * BAND[0]], [low * BAND[1], high * BAND[1]], color="#dddddd",
                       label=f"measured / forecast {BAND[0]:g} to {BAND[1]:g}", zorder=1)  # fmt: skip
    panel.plot([low, high], [low, high], color="black", linewidth=1, zorder=2)
    for op, marker in zip(dict.fromkeys(row["op"] for row in rows), "osD^vPX*<>hdp" * 9):
        part = [row for row in rows if row["op"] == op]
        x, y = ([float(row[name]) for row in part] for name in ("forecast_us", "measured_us"))
        panel.scatter(x, y, s=34, marker=marker, alpha=0.85, label=op, zorder=3)
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    panel.set(xlabel="forecast (us)", ylabel="measured, p50 (us)", title=f"Forecast and measured, {title}")
    figure.tight_layout()
    legend_below(figure, panel, columns=4)
    return figure
