"""Benchmark tasks small enough for a test, and a provider around one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.providers import Prepared, Provider, Workload
from bench.tasks import Task
from fused_ops import REGISTRY
from fused_ops.testing import Case, Op


class Made(Provider):
    """A provider around one function."""

    name = "made"

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def available(self, device: str) -> str:
        return ""

    def prepare(self, work: Workload) -> Prepared:
        return Prepared(self.call)


SIZES = {1: (40,), 2: (24, 40), 3: (24, 16, 40), 4: (2, 24, 16, 40)}
"""A benchmark shape of so many dimensions, made small."""


def arguments(
    op: Op, device: str = "cpu", dtype: torch.dtype | None = None, variant: str | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a benchmark case of the op with small sizes; by default with an activation, and in fp32 where it trains."""
    if variant is None:
        variant = next((v for v in op.bench.variants if v not in (None, "none")), None)
    if dtype is None:
        dtype = torch.float32 if op.trains else op.bench.dtypes[0]
    return op.bench.make(device, _shape(op), dtype, variant)


def _shape(op: Op) -> tuple[int, ...]:
    return SIZES[len(next(iter(op.bench.shapes.values())))]


def task(name: str, pass_: str = "fwd", kind: str = "wall", dtype: torch.dtype | None = None) -> Task:
    """A task of an op with small arguments."""
    op = REGISTRY[name]
    case = Case(
        f"small_{name}", dtype or (torch.float32 if op.trains else op.bench.dtypes[0]), _shape(op),
        lambda device: arguments(op, device, dtype),
    )  # fmt: skip
    return Task(op, case, pass_, kind)
