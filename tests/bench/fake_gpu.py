"""A pytest plugin that runs bench/test_3_matrix.py on the fake CUDA layer with small tasks and made-up providers: one right,
one wrong, one that cannot be captured, one that fails. The numbers mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import Prepared, Provider, Unsupported, Workload
from tests.bench import fake_cuda
from tests.bench.small import task


class Made(Provider):
    def __init__(self, name: str, call: Any, absent: str = "", role: str = "peer") -> None:
        self.name, self.call, self.absent, self.role = name, call, absent, role

    def available(self, device: str) -> str:
        return self.absent

    def prepare(self, work: Workload) -> Prepared:
        if isinstance(self.call, Exception):
            raise self.call
        return Prepared(self.call)


def _waits(x: Tensor, dim: int) -> Tensor:
    """Right, and no graph can hold it."""
    torch.cuda.synchronize()
    return F.softmax(x, dim)


PROVIDERS = (
    Made("right", lambda x, dim: F.softmax(x, dim)),
    Made("waits", _waits),
    Made("wrong", lambda x, dim: F.softmax(x, dim) * 1.5),
    Made("broken", ValueError("it broke\nat length")),
    Made("refuses", Unsupported("not this op")),
    Made("away", None, absent="away is not installed"),
    Made("ours", lambda x, dim: F.softmax(x, dim), role="ours"),
)
TASKS = [task("softmax", pass_, kind) for pass_, kind in (("bwd", "kernel"), ("fwd", "kernel"), ("fwd+bwd", "wall"))]


def pytest_load_initial_conftests() -> None:
    fake_cuda.install()

    import bench.test_3_matrix as matrix_tests

    matrix_tests.PROVIDERS = PROVIDERS
    matrix_tests.by_name = lambda name: next(p for p in PROVIDERS if p.name == name)
    matrix_tests.matrix = lambda only, names: [(t, n) for t in TASKS for n in names]
