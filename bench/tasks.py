"""The matrix: every benchmark case of every op, times the passes that it has, in the order that matters most first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fused_ops._torch.spec import REGISTRY, Case, Op

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PASSES = ("fwd", "train_fwd", "bwd", "fwd+bwd")
LATENCY_ROWS = 256
"""Cases with at most this many rows are latency cases: for them the wall time of a call is measured too."""


@dataclass(frozen=True)
class Task:
    """One thing to measure for each provider: a case of an op, a pass over it, and which time is taken.

    pass_: "fwd" without gradients, "train_fwd" with them recorded, "bwd" alone, "fwd+bwd". kind: "kernel" or "wall".
    """

    spec: Op
    case: Case
    pass_: str
    kind: str

    @property
    def key(self) -> dict[str, str]:
        """The CSV columns that name the task."""
        return {
            "op": self.spec.name, "case": self.case.name, "dtype": dtype_name(self.case.dtype),
            "pass": self.pass_, "kind": self.kind,
        }  # fmt: skip

    @property
    def id(self) -> str:
        """softmax-4k-bf16-fwd-kernel: what --only patterns and pytest -k are matched against."""
        return "-".join(self.key.values())

    @property
    def is_matmul(self) -> bool:
        return self.spec.roles.multiplies

    def work(self) -> tuple[int, int]:
        """(bytes, FLOPs) that the pass needs at the least."""
        (fwd_bytes, bwd_bytes), (fwd_flops, bwd_flops) = self.spec.bench.bytes(self.case), self.spec.bench.flops(self.case)
        if self.pass_ == "bwd":
            return bwd_bytes, bwd_flops
        if self.pass_ == "fwd+bwd":
            return fwd_bytes + bwd_bytes, fwd_flops + bwd_flops
        return fwd_bytes, fwd_flops


def dtype_name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def priority(task: Task, provider: str, index: int) -> tuple[int, int, int]:
    """Smaller runs first: bf16 before fp8 before fp16 before fp32; within a dtype forward, backward, latency, then the rest.

    index: the task's place among its op's, so that ops take turns. Autotuning for minutes a case comes last of all.
    """
    dtype = {"bf16": 0, "float8_e4m3fn": 1, "fp16": 2}.get(dtype_name(task.case.dtype), 3)
    latency = task.case.shape[0] <= LATENCY_ROWS and not task.is_matmul
    stage = {"fwd": 0, "bwd": 1, "train_fwd": 2, "fwd+bwd": 3}[task.pass_]
    if task.kind == "wall":
        stage = 1 if task.pass_ == "fwd" else 3
    bytes_, flops = task.work()
    huge = bytes_ > 8 << 30 or flops > 8e12  # a case that alone takes seconds
    return dtype + huge + (3 if "max-autotune" in provider else 0), stage + latency, index


def matrix(only: str, providers: Sequence[str]) -> list[tuple[Task, str]]:
    """All (task, provider) whose joint id matches the regular expression only, in the order to run them."""
    counts: Counter[str] = Counter()
    ranked = []
    for task in all_tasks():
        counts[task.spec.name] += 1
        for provider in providers:
            if re.search(only, f"{task.id}-{provider}"):
                ranked.append((priority(task, provider, counts[task.spec.name]), task, provider))
    return [(task, provider) for _, task, provider in sorted(ranked, key=lambda r: r[0])]


def all_tasks() -> Iterator[Task]:
    for spec in REGISTRY.values():
        passes = PASSES if spec.trains else ("fwd",)
        for case in spec.bench.cases():
            for pass_ in passes:
                # Elsewhere a forward that records gradients runs the same kernels; a matmul stores its pre-activation.
                if pass_ != "train_fwd" or spec.roles.multiplies:
                    yield Task(spec, case, pass_, "kernel")
            if case.shape[0] <= LATENCY_ROWS:
                for pass_ in ("fwd", "fwd+bwd"):
                    if pass_ in passes:
                        yield Task(spec, case, pass_, "wall")
