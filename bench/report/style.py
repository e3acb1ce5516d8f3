"""How every picture looks: one colour a provider, in every picture the same."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "ours": "#d62728", "ours+compile": "#ff7f6e", "eager": "#7f7f7f", "compile": "#1f77b4", "compile-max-autotune": "#0b3d66",
    "liger": "#2ca02c", "quack": "#9467bd", "helion": "#e377c2", "flag-gems": "#bcbd22", "cublaslt": "#8c564b",
    "scaled_mm": "#c49c94", "torchscript": "#ffb000", "onnxruntime": "#17becf", "tensorrt": "#76b900", "aotinductor": "#aec7e8",
    "autograd.Function": "#1f77b4", "custom_op": "#2ca02c", "torch": "#7f7f7f",
}  # fmt: skip
MARKERS = {"ours": "o", "eager": "s", "compile": "^", "compile-max-autotune": "v", "liger": "D", "quack": "P", "helion": "X"}

plt.rcParams.update({
    "figure.dpi": 110, "savefig.bbox": "tight", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "axes.axisbelow": True,
})  # fmt: skip


def color(provider: str) -> str:
    return COLORS.get(provider, "#333333")


def providers_first_ours(names: list[str]) -> list[str]:
    """Ours first, then in the order of COLORS, so that legends read alike."""
    known = [n for n in COLORS if n in names]
    return known + sorted(n for n in names if n not in COLORS)


def legend_below(figure: Figure, axes: Axes, columns: int = 6) -> None:
    """One legend under all panels, of everything that any panel shows."""
    entries: dict[str, object] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=columns)


def length_label(n: float) -> str:
    """A power of two from 1024 on in units of 1024, as 4k for 4096; any other length as it is."""
    n = int(n)
    return f"{n // 1024}k" if n >= 1024 and n & (n - 1) == 0 else str(n)
