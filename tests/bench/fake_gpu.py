"""A pytest plugin that runs bench/test_3_matrix.py on the CPU: small tasks, made-up providers, and torch.cuda as far as the
flow needs it. Captures fail, so that timing goes by events, which read the wall clock. The numbers mean nothing.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from bench import environment, record, timing
from bench.providers import Prepared, Provider, Unsupported, Workload
from tests.bench.small import task


class Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no capture here")


class Made(Provider):
    def __init__(self, name: str, call: Any, absent: str = "", role: str = "peer") -> None:
        self.name, self.call, self.absent, self.role = name, call, absent, role

    def available(self, device: str) -> str:
        return self.absent

    def prepare(self, work: Workload) -> Prepared:
        if isinstance(self.call, Exception):
            raise self.call
        return Prepared(self.call)


PROVIDERS = (
    Made("right", lambda x, dim: F.softmax(x, dim)),
    Made("wrong", lambda x, dim: F.softmax(x, dim) * 1.5),
    Made("broken", ValueError("it broke\nat length")),
    Made("refuses", Unsupported("not this op")),
    Made("away", None, absent="away is not installed"),
    Made("ours", lambda x, dim: F.softmax(x, dim), role="ours"),
)
TASKS = [task("softmax", pass_, kind) for pass_, kind in (("fwd", "kernel"), ("bwd", "kernel"), ("fwd+bwd", "wall"))]

environment.environment()  # what this machine is, before torch.cuda says otherwise
fakes: dict[str, Any] = {
    "is_available": lambda: True, "synchronize": lambda *_: None, "CUDAGraph": object, "graph": refuse, "Event": Event,
    "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "stream": lambda s: nullcontext(),
    "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "empty_cache": lambda: None,
    "memory_allocated": lambda: 0, "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 4096,
}  # fmt: skip
for name, fake in fakes.items():
    setattr(torch.cuda, name, fake)
record.clocks = lambda: {"clock_sm_mhz": "1"}
timing.TARGET_S = 1e-4

import bench.test_3_matrix as matrix_tests  # noqa: E402 - after torch.cuda was replaced

matrix_tests.DEVICE = "cpu"
matrix_tests.PROVIDERS = PROVIDERS
matrix_tests.by_name = lambda name: next(p for p in PROVIDERS if p.name == name)
matrix_tests.matrix = lambda only, names: [(t, n) for t in TASKS for n in names]
