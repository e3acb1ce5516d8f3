"""The CSV as a DataFrame with numbers in its number columns, and the selections that the plots draw."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..record import annotate, read

NUMBERS = (
    "p20_us", "p50_us", "p80_us", "gbps", "tflops", "limit_us", "percent_of_limit", "bytes", "flops",
    "ratio_to_best_peer", "error", "peak_bytes",
)  # fmt: skip
LATENCY_ROWS = 256
PASS_ORDER = ("fwd", "train_fwd", "bwd", "fwd+bwd", "train_step")
VARIANTS = ("gelu_tanh", "quick_gelu", "gelu", "silu", "relu2", "relu", "sigmoid", "tanh", "None")  # longest endings first
DTYPE_ORDER = ("bf16", "fp16", "fp32")


def load(path: Path) -> pd.DataFrame:
    """The rows of a results file, annotated again so that a run cut short has its ratios too; the last of equal rows counts."""
    frame = pd.DataFrame(annotate(read(path)))
    for column in NUMBERS:
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    key = ["op", "case", "dtype", "pass", "kind", "provider"]
    return frame.drop_duplicates(key, keep="last").reset_index(drop=True)


def timed(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The measurements of one kind that have a time, with M and the row length N where the shape has them."""
    chosen = frame[(frame["kind"] == kind) & (frame["status"] == "ok")].copy()
    sizes = chosen["shape"].str.split("x")
    chosen["M"] = pd.to_numeric(sizes.str[0], errors="coerce")
    chosen["N"] = pd.to_numeric(sizes.str[1], errors="coerce")
    chosen["rank"] = sizes.str.len()
    chosen["variant"] = [variant_of(case) for case in chosen["case"]]
    return chosen


def variant_of(case: str) -> str:
    """The activation that a matmul case's name ends in; "" for other cases. Each has pictures of its own."""
    return next((name for name in VARIANTS if case.endswith("_" + name)), "")


def row_ops(frame: pd.DataFrame) -> pd.DataFrame:
    """Kernel times of ops over rows, on shapes that fill a GPU."""
    kernels = timed(frame, "kernel")
    return kernels[(kernels["rank"] == 2) & (kernels["M"] > LATENCY_ROWS) & (kernels["op"] != "model")]


def matmul_ops(frame: pd.DataFrame) -> pd.DataFrame:
    """Kernel times of matrix products."""
    kernels = timed(frame, "kernel")
    return kernels[kernels["rank"] >= 3]


def limits(frame: pd.DataFrame) -> dict[str, float]:
    """{"copy": GB/s, dtype: TFLOP/s} measured in the run."""
    roof = frame[(frame["kind"] == "roofline") & (frame["status"] == "ok")]
    return {r["case"]: float(r["gbps"] if r["case"] == "copy" else r["tflops"]) for _, r in roof.iterrows()}


def ordered(values: pd.Series, order: tuple[str, ...]) -> list[str]:
    """The distinct values, known ones in order and others after them."""
    found = list(dict.fromkeys(values))
    return [v for v in order if v in found] + [v for v in found if v not in order]


def title_of(frame: pd.DataFrame) -> str:
    """What the numbers were measured on, in one line."""
    row = frame.iloc[-1]
    machine = row["gpu"] or f"{row['cpu']} (no GPU: CPU measurements only)"
    commits = ", ".join(dict.fromkeys(frame["commit"].astype(str)))  # of several calls that were filed together
    parts = [machine, f"torch {row['torch']}", f"triton {row['triton']}", f"commit {commits}", str(row["time"])[:10]]
    return ", ".join(p for p in parts if not p.endswith(" "))
