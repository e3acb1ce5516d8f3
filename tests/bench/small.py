"""Benchmark tasks small enough for a test, and a provider around one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.providers import Prepared, Provider, Workload
from bench.tasks import Task
from fused_ops import REGISTRY
from fused_ops._torch.spec import Case
from fused_ops.ops.linear.cases.linear_fp8 import quantise


class Made(Provider):
    """A provider around one function."""

    name = "made"

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def available(self, device: str) -> str:
        return ""

    def prepare(self, work: Workload) -> Prepared:
        return Prepared(self.call)


def task(op: str, pass_: str = "fwd", kind: str = "wall", dtype: torch.dtype = torch.float32, rows: int = 24) -> Task:
    """A task of softmax, layer_norm, layer_norm_fp8, linear, mlp or linear_fp8 with small arguments of the registry's form."""
    shapes: dict[str, tuple[int, ...]] = {"softmax": (rows, 40), "layer_norm": (rows, 40), "linear": (rows, 16, 40)}
    shapes["layer_norm_fp8"] = shapes["layer_norm"]
    shapes["linear_fp8"] = shapes["mlp"] = shapes["linear"]

    def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def r(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        if op == "softmax":
            return (r(rows, 40),), {"dim": -1}
        if op.startswith("layer_norm"):
            return (r(rows, 40), (40,), r(40), r(40)), {}
        if op == "mlp":
            return (r(rows, 40), r(16, 40), r(16), r(40, 16), r(40), "gelu"), {}
        if op == "linear_fp8":
            (x, x_scale), (w, w_scale) = (quantise(torch.randn(n, 40, device=device), True) for n in (rows, 16))
            return (x, w, x_scale, w_scale, torch.randn(16, device=device).bfloat16(), "gelu"), {}
        return (r(rows, 40), r(16, 40), r(16), "gelu"), {}

    dtype = torch.float8_e4m3fn if op == "linear_fp8" else dtype
    return Task(REGISTRY[op], Case(f"small_{op}", dtype, shapes[op], make), pass_, kind)
