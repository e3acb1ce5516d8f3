"""The pictures. Each function draws one figure from a DataFrame, or returns None when there is nothing to draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .frame import limits, matmul_ops, ordered, row_ops, timed
from .style import MARKERS, color, legend_below, length_label, plt, providers_first_ours

LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}  # behind a number that a line may cross


def speed_against_length(frame: pd.DataFrame, op: str, dtype: str) -> Figure | None:
    """Achieved GB/s against row length for each pass, with the measured copy bandwidth drawn as the limit.

    Where a row length was measured with several numbers of rows, the most rows that ours has are drawn, for everybody.
    """
    data = row_ops(frame)
    data = data[(data["op"] == op) & (data["dtype"] == dtype)]
    if data.empty:
        return None
    passes = ordered(data["pass"], ("fwd", "bwd", "fwd+bwd"))
    figure, axes = plt.subplots(1, len(passes), figsize=(5.6 * len(passes), 4.2), sharey=True, squeeze=False)
    copy = limits(frame).get("copy")
    for panel, pass_ in zip(axes[0], passes):
        part = data[data["pass"] == pass_]
        drawn = part[part["provider"] == "ours"] if "ours" in set(part["provider"]) else part
        part = part[part["M"] == part["N"].map(drawn.groupby("N")["M"].max())]
        lengths = sorted(part["N"].unique())
        place = {n: i for i, n in enumerate(lengths)}
        for name in providers_first_ours(list(part["provider"].unique())):
            line = part[part["provider"] == name].groupby("N")["gbps"].max()
            panel.plot(
                [place[n] for n in line.index], line.to_numpy(), label=name, color=color(name), markersize=5,
                marker=MARKERS.get(name, "."), linewidth=2.4 if name == "ours" else 1.2, zorder=3 if name == "ours" else 2,
            )  # fmt: skip
        if copy:
            panel.axhline(copy, color="black", linestyle="--", linewidth=1, label=f"copy limit, {copy:.0f} GB/s")
        panel.set_xticks(range(len(lengths)), [length_label(n) for n in lengths], rotation=45, ha="right")
        panel.set_title(f"{op} {pass_}, {dtype}")
        panel.set_xlabel("row length N (elements)")
    axes[0][0].set_ylabel("fewest bytes / time (GB/s)")
    axes[0][0].set_ylim(bottom=0)
    figure.tight_layout()
    legend_below(figure, axes[0][0])
    return figure


def matmul_speed(frame: pd.DataFrame, op: str, dtype: str, pass_: str, variant: str) -> Figure | None:
    """TFLOP/s of each provider by case, with the measured matrix rate drawn as the limit. variant: the activation."""
    data = matmul_ops(frame)
    data = data[(data["op"] == op) & (data["dtype"] == dtype) & (data["pass"] == pass_) & (data["variant"] == variant)]
    if data.empty:
        return None
    figure = _grouped_bars(data, "tflops", "2MNK FLOPs / time (TFLOP/s)", f"{op} {variant} {pass_}, {dtype}")
    if rate := limits(frame).get(dtype):
        panel = figure.axes[0]
        panel.axvline(rate, color="black", linestyle="--", linewidth=1, label=f"8192^3 product, {rate:.0f} TFLOP/s")
    legend_below(figure, figure.axes[0])
    return figure


def ratios(frame: pd.DataFrame, op: str, dtype: str, pass_: str, variant: str, kind: str = "kernel") -> Figure | None:
    """Ours over each peer in speed, by case; right of 1 ours is faster."""
    data = timed(frame, kind)
    data = data[(data["op"] == op) & (data["dtype"] == dtype) & (data["pass"] == pass_) & (data["variant"] == variant)]
    ours = data[data["provider"] == "ours"].set_index("case")["p50_us"]
    peers = data[(data["role"] == "peer") & data["case"].isin(ours.index)].copy()
    if peers.empty:
        return None
    peers["ratio"] = peers["p50_us"] / peers["case"].map(ours)
    what = {"kernel": "device time", "wall": "wall time of a call", "host": "host time of a call"}.get(kind, kind)
    figure = _grouped_bars(peers, "ratio", "speed of ours / speed of the peer (more than 1: ours is faster)",
                           f"{op} {variant} {pass_}, {dtype}, {what}".replace("  ", " "), text="{:.2f}")  # fmt: skip
    figure.axes[0].axvline(1.0, color="black", linewidth=1)
    legend_below(figure, figure.axes[0])
    return figure


def _grouped_bars(data: pd.DataFrame, value: str, label: str, title: str, text: str = "{:.0f}") -> Figure:
    """Horizontal bars, one group a case and one bar a provider, each with its number at its end."""
    cases = list(dict.fromkeys(data.sort_values("bytes")["case"]))
    names = providers_first_ours(list(data["provider"].unique()))
    height = 0.8 / len(names)
    figure, panel = plt.subplots(figsize=(8.5, 1.4 + 0.22 * len(cases) * (len(names) + 1)))
    widest = data[value].max()
    for i, name in enumerate(names):
        rows = data[data["provider"] == name].set_index("case")[value].reindex(cases)
        places = np.arange(len(cases)) - 0.4 + height * (i + 0.5)
        panel.barh(places, rows.fillna(0), height * 0.92, color=color(name), label=name)
        for place, number in zip(places, rows):
            if np.isfinite(number):
                panel.text(number + 0.01 * widest, place, text.format(number), va="center", fontsize=7, bbox=LABEL, zorder=4)
    panel.set_yticks(range(len(cases)), cases)
    panel.set_ylim(len(cases) - 0.45, -0.55)
    panel.set_xlim(0, widest * 1.1)
    panel.set_xlabel(label)
    panel.set_title(title)
    panel.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def roofline(frame: pd.DataFrame, dtype: str) -> Figure | None:
    """Every kernel of ours, and the best peer's, under the measured limits: FLOP/s against FLOPs per byte, both logarithmic."""
    measured = limits(frame)
    data = timed(frame, "kernel")
    data = data[(data["dtype"] == dtype) & data["tflops"].notna() & (data["bytes"] > 0)]
    if data.empty or "copy" not in measured:
        return None
    figure, panel = plt.subplots(figsize=(8.5, 5.2))
    intensity = data["flops"] / data["bytes"]
    low, high = max(intensity.min() / 3, 1e-2), intensity.max() * 3
    slope = measured["copy"] * 1e9 / 1e12  # TFLOP/s at one FLOP per byte
    rate = measured.get(dtype)
    x = np.geomspace(low, high, 200)
    roof = np.minimum(x * slope, rate) if rate else x * slope
    name = f"limit: {measured['copy']:.0f} GB/s" + (f", {rate:.0f} TFLOP/s {dtype}" if rate else "")
    panel.plot(x, roof, color="black", linewidth=1.4, label=name)
    best = data[data["role"] == "peer"].sort_values("p50_us").drop_duplicates(["op", "case", "pass"])
    panel.scatter(
        best["flops"] / best["bytes"], best["tflops"], s=22, facecolors="none", edgecolors="black", label="best peer", zorder=4
    )
    markers = dict(zip(sorted(data["op"].unique()), "osD^vPX*<>hdp"))
    for op, part in data[data["provider"] == "ours"].groupby("op"):
        panel.scatter(
            part["flops"] / part["bytes"], part["tflops"], s=34, marker=markers[op], alpha=0.8, label=f"ours: {op}", zorder=3
        )
    panel.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="TFLOP/s", title=f"Roofline, {dtype}")
    figure.tight_layout()
    legend_below(figure, panel, columns=4)
    return figure


def times(frame: pd.DataFrame, kind: str, op: str, unit: str) -> Figure | None:
    """Time bars with p20-p80 whiskers of one kind of measurement (host, startup, models): shorter is faster."""
    data = timed(frame, kind)
    data = data[data["op"] == op]
    if data.empty:
        return None
    scale = {"us": 1.0, "ms": 1e3, "s": 1e6}[unit]
    data = data.assign(label=data["case"] + "  " + data["pass"] + " " + data["dtype"] + "  " + data["provider"])
    if kind == "startup":
        data = data.assign(label=data["case"] + "  " + data["provider"])
    figure, panel = plt.subplots(figsize=(8.5, 1.2 + 0.3 * len(data)))
    middle = data["p50_us"] / scale
    whiskers = [(middle - data["p20_us"] / scale).clip(lower=0), (data["p80_us"] / scale - middle).clip(lower=0)]
    panel.barh(data["label"], middle, xerr=whiskers, color=[color(p) for p in data["provider"]], ecolor="#444444", capsize=2)
    reach = data["p80_us"].max() / scale
    for i, (value, end) in enumerate(zip(middle, data["p80_us"] / scale)):
        panel.text(end + 0.015 * reach, i, f"{value:.3g}", va="center", fontsize=8)
    panel.set_xlim(0, reach * 1.12)
    panel.invert_yaxis()
    what = {"cpu": "CPU time of an inference, one thread", "host": "host time of a call", "startup": "CPU time, paid once",
            "wall": "wall time of a call", "kernel": "device time"}[kind]  # fmt: skip
    panel.set_xlabel(f"{what} ({unit}): p50, whiskers p20 to p80")
    machine = data.iloc[-1]["gpu"] or data.iloc[-1]["cpu"]
    panel.set_title(f"{op}, on {machine}")
    panel.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure
