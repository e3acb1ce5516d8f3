"""One measurement: prepare a provider, compare it with the reference, time it, and record all in one CSV row."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .check import Verdict, expected, verdict
from .inputs import Arguments, argument_sets, memory_needed, outputs, sets_needed
from .providers import Prepared, Provider, Workload
from .record import rates, spread
from .roofline import Roofline
from .tasks import Task
from .timing import Replay, Step, peak_bytes, side_stream, synchronize, wall_samples


class Skip(Exception):  # noqa: N818 - no error: a measurement that cannot be made here
    """Why a task cannot be measured on this machine."""


@dataclass
class Bundle:
    """What all providers of one task share: the argument sets, and the reference results for the first and the last set."""

    task: Task
    device: str
    sets: list[Arguments]
    cold: bool
    references: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, device: str) -> Bundle:
        sets, cold = sets_needed(task, device)
        if device.startswith("cuda"):
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            while sets > 1 and memory_needed(task, sets) > 0.8 * free:
                sets //= 2
                cold = sets > 1 and cold
            if (needed := memory_needed(task, sets)) > 0.9 * free:
                raise Skip(f"needs about {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB are free")
        return cls(task, device, argument_sets(task, sets, device), cold)

    def reference(self, index: int) -> list[Tensor]:
        if index not in self.references:
            self.references[index] = expected(self.task, self.sets[index])
        return self.references[index]

    def check(self, results: list[Tensor], index: int) -> Verdict:
        return verdict(self.task, results, self.reference(index))


def step_of(task: Task, call: Callable[..., Any], arguments: Arguments) -> Step:
    """A function without arguments that runs the pass on one set of arguments and returns its results."""
    args, kwargs, dy = arguments.args, arguments.kwargs, list(arguments.dy)
    leaves = arguments.leaves()
    if task.pass_ == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return outputs(call(*args, **kwargs))

        return forward
    if task.pass_ == "train_fwd":
        return lambda: tuple(o.detach() for o in outputs(call(*args, **kwargs)))
    if task.pass_ == "fwd+bwd":

        def both() -> tuple[Tensor, ...]:
            out = outputs(call(*args, **kwargs))
            return *(o.detach() for o in out), *torch.autograd.grad(out, leaves, dy)

        return both
    return _Backward(lambda: outputs(call(*args, **kwargs)), leaves, dy)


class _Backward:
    """The backward alone. Its forward is kept from the first call, and belongs to the stream of that call."""

    def __init__(self, forward: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], dy: list[Tensor]) -> None:
        self.forward, self.leaves, self.dy = forward, leaves, dy
        self.kept: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        """Drop the forward: the next call makes another."""
        self.kept = ()

    def __call__(self) -> tuple[Tensor, ...]:
        if not self.kept:
            self.kept = self.forward()
        return torch.autograd.grad(self.kept, self.leaves, self.dy, retain_graph=True)


def prepare(provider: Provider, bundle: Bundle) -> Prepared:
    """The provider made ready for the task's case."""
    first = bundle.sets[0]
    return provider.prepare(
        Workload(bundle.task.spec, bundle.task.case, bundle.task.pass_, first.args, first.kwargs, bundle.device)
    )


class Measurement:
    """A provider, checked, on a task; `kernel_samples` or `wall` times it and `row` tells the result."""

    def __init__(self, provider: Provider, bundle: Bundle) -> None:
        self.provider, self.bundle, self.task = provider, bundle, bundle.task
        self.prepared = prepare(provider, bundle)
        self.steps = [step_of(self.task, self.prepared.call, arguments) for arguments in bundle.sets]
        on_gpu = bundle.device.startswith("cuda")
        with side_stream() if on_gpu and self.task.kind == "kernel" else contextlib.nullcontext():
            results = [r.clone() for r in self.steps[0]()]
        synchronize(bundle.device)
        self.verdict = bundle.check(results, 0)
        self.replay: Replay | None = None

    def capture(self) -> Replay:
        """Capture the steps, poison their results, replay, and hold the last step's results to the reference again."""
        self.replay = Replay(self.steps, self.prepared.no_graph)
        inputs = {a.data_ptr() for s in self.bundle.sets for a in (*s.args, *s.kwargs.values(), *s.dy) if isinstance(a, Tensor)}
        self.replay.poison(keep=inputs)
        self.replay.run()
        synchronize(self.bundle.device)
        last = len(self.steps) - 1
        self.verdict = max(self.verdict, self.bundle.check(list(self.replay.results[last]), last), key=lambda v: v.error)
        return self.replay

    def rounds(self) -> int:
        """How many samples to take now, the clocks having been brought up."""
        assert self.replay is not None
        return self.replay.rounds()

    def wall(self) -> list[float]:
        return wall_samples(self.steps[0], self.bundle.device)

    def row(self, samples: list[float], roofline: Roofline | None) -> dict[str, Any]:
        """The CSV row; without samples for a provider that is wrong."""
        configuration = "; ".join(
            c for c in (self.prepared.configuration, self.replay.why_no_graph if self.replay else "") if c
        )
        row = describe(self.task, self.provider) | {
            "configuration": configuration,
            "status": "ok" if self.verdict.right else "wrong",
            "reason": self.verdict.reason(),
            "error": f"{self.verdict.error:.3g}",
            "error_limit": f"{self.verdict.limit:.3g}",
        }
        if not self.verdict.right:
            return row
        moved, flops = self.task.work()
        if self.replay is not None:
            row |= {"method": self.replay.method, "l2": "cold" if self.bundle.cold else "warm"}
            row["peak_bytes"] = peak_bytes(self.steps[0])
        else:
            row["method"] = "loop"
        limit = roofline.limit(moved, flops, self.task) if roofline is not None and self.replay is not None else None
        row |= spread(samples)
        return row | rates(float(row["p50_us"]) * 1e-6, moved, flops, limit)


def describe(task: Task, provider: Provider) -> dict[str, Any]:
    """The columns that name a measurement."""
    shape = "x".join(str(s) for s in task.case.shape)
    return {**task.key, "provider": provider.name, "role": provider.role, "shape": shape}


SLOW_COLLECTION_S = 0.03


def release() -> None:
    """Free device memory between tasks: the private pools of CUDA graphs are large.

    A collection looks at every object of the process, which libraries fill with millions; those are looked at once.
    """
    start = time.perf_counter()
    gc.collect()
    if time.perf_counter() - start > SLOW_COLLECTION_S:
        gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
