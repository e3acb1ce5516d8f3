"""The goals of the project, as data: what ours must reach against which peer, or against the hardware's limit.

Set before anything was measured, from published figures and arithmetic. A goal is met, missed, or open: open where the
peer it names was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COMPILE = ("compile", "compile-max-autotune")


@dataclass(frozen=True)
class Goal:
    """One goal. least: the smallest ratio to the best of peers (all, if empty), or with of_limit the least % of the limit."""

    ops: tuple[str, ...]
    passes: tuple[str, ...]
    where: Callable[[tuple[int, ...], str], bool]
    least: float
    peers: tuple[str, ...] = ()
    of_limit: bool = False

    def text(self) -> str:
        if self.of_limit:
            return f">= {self.least:g}% of the limit"
        return f">= {self.least:g}x {' / '.join(self.peers) if self.peers else 'the best peer'}"


def _rows(low: int, high: int, least_m: int = 257) -> Callable[[tuple[int, ...], str], bool]:
    """Cases of low <= N <= high with enough rows to fill a GPU."""
    return lambda shape, _: low <= shape[-1] <= high and shape[0] >= least_m


def _linear(kinds: tuple[str, ...], low: int, high: int, least_m: int = 257) -> Callable[[tuple[int, ...], str], bool]:
    """Linear cases (M, N, K) with low <= K <= high whose name ends in one of the activations."""
    return lambda shape, case: shape[0] >= least_m and low <= shape[2] <= high and any(case.endswith("_" + k) for k in kinds)


def _odd_or_short(shape: tuple[int, ...], _: str) -> bool:
    return shape[0] >= 257 and (shape[-1] <= 256 or shape[-1] % 2 == 1) and shape[-1] != 50257


ANY = 1 << 40
GOALS = (
    Goal(("softmax",), ("fwd",), _rows(1, 32768), 0.98, ("quack",)),
    Goal(("softmax",), ("fwd",), _rows(4096, 32768), 90, of_limit=True),
    Goal(("softmax",), ("fwd",), _odd_or_short, 1.1),
    Goal(("softmax",), ("fwd",), _rows(50257, 50257), 1.2),
    Goal(("softmax",), ("fwd",), _rows(65536, 65536), 0.93),
    Goal(("softmax",), ("fwd",), _rows(65536, 65536), 1.4, ("liger",)),
    Goal(("softmax",), ("fwd",), _rows(65537, ANY), 0.80),
    Goal(("softmax",), ("bwd",), _rows(1, 32768), 1.0, ("quack",)),
    Goal(("softmax",), ("bwd",), _rows(32769, ANY), 0.8),
    Goal(("layer_norm",), ("fwd",), _rows(1, 32768), 0.98),
    Goal(("layer_norm",), ("fwd",), _rows(32769, ANY), 0.85),
    Goal(("layer_norm",), ("bwd",), _rows(1, ANY), 1.0, (*COMPILE, "quack")),
    Goal(("layer_norm",), ("bwd",), _rows(2048, ANY), 1.8, ("eager", "liger")),
    Goal(("layer_norm",), ("bwd",), _rows(1, ANY), 75, of_limit=True),
    Goal(("layer_norm",), ("bwd",), _rows(16384, 16384, least_m=65536), 1.2, COMPILE),
    Goal(("linear",), ("fwd",), _linear(("gelu_tanh",), 1, ANY), 0.97, ("cublaslt",)),
    Goal(("linear",), ("fwd",), _linear(("gelu", "silu"), 1, 1024), 1.25, ("eager",)),
    Goal(("linear",), ("fwd",), _linear(("gelu", "silu"), 4096, ANY), 1.05, ("eager",)),
    Goal(("linear",), ("fwd",), lambda shape, _: shape[0] <= 16, 0.95),
    Goal(("linear",), ("train_fwd",), _linear(("gelu", "gelu_tanh", "silu"), 1, 1024), 1.1),
    Goal(("linear",), ("train_fwd",), _linear(("gelu", "gelu_tanh", "silu"), 4096, ANY), 1.02),
    Goal(("linear",), ("bwd",), _linear(("gelu", "gelu_tanh", "silu"), 1, 1024), 1.05),
    Goal(("linear",), ("bwd",), _linear(("gelu", "gelu_tanh", "silu"), 4096, ANY), 1.0),
    Goal(("mlp",), ("fwd+bwd",), lambda *_: True, 1.0, ("quack",)),
)
LATENCY = (
    Goal((), (), lambda *_: True, 2.0, ("quack", "liger")),
    Goal((), (), lambda *_: True, 1 / 1.3, ("eager",)),
)
"""Eager latency, every op: the wall time of a call on small shapes."""


def goals_for(row: Mapping[str, Any]) -> list[Goal]:
    """The goals that a row of ours is held to."""
    shape = tuple(int(s) for s in str(row["shape"]).split("x"))
    if row["kind"] == "wall":
        return list(LATENCY) if row["pass"] == "fwd" else []
    if row["kind"] != "kernel":
        return []
    return [g for g in GOALS if row["op"] in g.ops and row["pass"] in g.passes and g.where(shape, str(row["case"]))]


def judge(row: Mapping[str, Any], peers: Mapping[str, float]) -> tuple[str, str]:
    """(goals, verdicts), both joined by "; ": yes, no or open for each goal. peers: name -> p50 in microseconds."""
    texts, verdicts = [], []
    for goal in goals_for(row):
        if goal.of_limit:
            known = row.get("percent_of_limit") not in (None, "")
            met = known and float(row["percent_of_limit"]) >= goal.least
        else:
            measured = [peers[name] for name in (goal.peers or peers) if name in peers]
            known = bool(measured)
            met = known and min(measured) / float(row["p50_us"]) >= goal.least
        texts.append(goal.text())
        verdicts.append("yes" if met else "no" if known else "open")
    return "; ".join(texts), "; ".join(verdicts)
