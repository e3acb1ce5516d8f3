"""Benchmark tasks small enough for a test."""

from __future__ import annotations

from typing import Any

import torch

from bench.tasks import Task
from fused_ops import REGISTRY
from fused_ops._spec import Case


def task(op: str, pass_: str = "fwd", kind: str = "wall", dtype: torch.dtype = torch.float32, rows: int = 24) -> Task:
    """A task of softmax, layer_norm or linear with small arguments of the registry's form."""
    shapes: dict[str, tuple[int, ...]] = {"softmax": (rows, 40), "layer_norm": (rows, 40), "linear": (rows, 16, 40)}

    def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def r(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        if op == "softmax":
            return (r(rows, 40),), {"dim": -1}
        if op == "layer_norm":
            return (r(rows, 40), (40,), r(40), r(40)), {}
        return (r(rows, 40), r(16, 40), r(16), "gelu"), {}

    return Task(REGISTRY[op], Case(f"small_{op}", dtype, shapes[op], make), pass_, kind)
