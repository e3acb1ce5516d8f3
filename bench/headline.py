"""The rows that are measured first, in the order of the ops' own ranks, and who is measured in which sweep over them.

A run that is cut short has measured the rows at the top against the peers at the top. The matrix (tasks.py) holds these rows
and all others; the plans (plans.py) say which sweeps a call makes.
"""

from __future__ import annotations

from collections.abc import Iterable

from fused_ops._torch.spec import REGISTRY

from .tasks import Task, all_tasks, dtype_name

SWEEPS: dict[int, tuple[str, ...]] = {
    1: ("eager", "ours", "cublaslt", "scaled_mm"),
    2: ("compile",),
    3: ("liger", "flag-gems", "helion", "quack", "torchscript"),
    4: ("tensorrt", "onnxruntime", "checkpoint", "ours+recompute"),
    5: ("compile-max-autotune",),
}
"""Sweep -> the providers that are measured on every row before those of the next sweep."""


def headline_ops() -> list[str]:
    """The ops that have headline cases, the one with the first of them first."""
    first = {op.name: min(headline.rank for headline in op.bench.headline) for op in REGISTRY.values() if op.bench.headline}
    return sorted(first, key=first.__getitem__)


def headline_tasks() -> list[Task]:
    """The tasks of every op's headline cases, the most valuable first.

    Raises:
        KeyError: a headline names no case of its op.
    """
    known = {tuple(t.key.values()): t for t in all_tasks()}
    found = []
    ranked = [(headline, op) for op in REGISTRY.values() for headline in op.bench.headline]
    for headline, op in sorted(ranked, key=lambda pair: pair[0].rank):
        for case in headline.cases:
            for said in headline.passes:
                pass_, _, kind = said.partition(":")
                found.append(known[op.name, case, dtype_name(headline.dtype), pass_, kind or "kernel"])
    return found


def sweep(numbers: Iterable[int], providers: Iterable[str]) -> list[tuple[Task, str]]:
    """(task, provider) of the sweeps, one sweep after the other, for those of providers that are here."""
    here = set(providers)
    return [(task, name) for n in numbers for task in headline_tasks() for name in SWEEPS[n] if name in here]
