"""Kernels compiled before they are needed, in as many processes as there are cores.

`launches.listed` says what calls launch. Each kernel is then compiled by JITFunction.warmup with the options of the real
launch, launcher included, so that the process which makes the launches finds all of it in Triton's cache.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._runtime.cache_keys import settle
from .launches import Gpu, Launch, listed, unique
from .workers import Done, cores, in_processes, said

LISTING_PART = 0.5  # of the time: what listing may take at the most
SHARDS = 6  # parts of the listing for each process: what is listed when its time is over counts


@dataclass(frozen=True)
class Call:
    """Something that launches kernels: run() makes its tensors on launches.DEVICE, and is called where they are fake.

    dispatched: see `launches.listed`.
    """

    name: str
    run: Callable[[], Any]
    dispatched: bool = False


@dataclass
class Outcome:
    """What came of a precompilation.

    compiled, there: how many kernels were compiled and how many were in the cache before. failed: (kernel, why). unlisted:
    (call, why it could not be listed). left: kernels that the time did not suffice for. seconds: how long all took.
    launcher: why launchers were not built, "" where they were.
    """

    compiled: int = 0
    there: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[tuple[str, str]] = field(default_factory=list)
    left: int = 0
    processes: int = 0
    seconds: float = 0.0
    launcher: str = ""

    def __str__(self) -> str:
        text = f"{self.compiled + self.there} kernels ({self.there} already there), {len(self.failed)} failed"
        if self.failed:
            text += f" ({_few(self.failed)})"
        if self.unlisted:
            text += f", {len(self.unlisted)} calls not listed ({_few(self.unlisted)})"
        if self.left:
            text += f", {self.left} left when the time was over"
        if self.launcher:
            text += f", without launchers ({self.launcher})"
        return f"{text}, {self.processes} processes, {self.seconds:.1f} s"


def _few(failures: list[tuple[str, str]]) -> str:
    first = "; ".join(f"{name}: {why}" for name, why in failures[:3])
    return first if len(failures) <= 3 else f"{first}; and {len(failures) - 3} more"


def precompile(
    calls: Sequence[Call], gpu: Gpu, processes: int | None = None, seconds: float = float("inf"),
    done: Callable[[], None] = lambda: None, longest_first: bool = True,
) -> Outcome:  # fmt: skip
    """Compile every kernel that the calls launch on gpu: those that take longest first, or in the calls' order.

    processes: None: one a core. seconds: stop after so many. done: called after each kernel. A failure is counted and named,
    and stops nothing. The processes use no GPU: this one may or may not have a CUDA context.
    """
    start = time.monotonic()
    outcome = Outcome(processes=cores() if processes is None else processes)
    _imports()
    utilities, outcome.launcher = _cuda_utilities()
    deadline = start + seconds
    launches = _list(calls, gpu, outcome, min(deadline, start + LISTING_PART * seconds))
    if longest_first:
        launches.sort(key=Launch.work, reverse=True)

    def compile_one(launch: Launch) -> bool:
        return _compile(launch, gpu, utilities)

    seen = 0
    for ended in in_processes(compile_one, launches, outcome.processes, deadline):
        _count(outcome, launches[ended.item], ended)
        seen += 1
        done()
    outcome.left = len(launches) - seen
    outcome.seconds = time.monotonic() - start
    return outcome


def _count(outcome: Outcome, launch: Launch, ended: Done) -> None:
    if ended.error:
        outcome.failed.append((launch.kernel, ended.error))
    elif ended.result:
        outcome.there += 1
    else:
        outcome.compiled += 1


def _list(calls: Sequence[Call], gpu: Gpu, outcome: Outcome, deadline: float) -> list[Launch]:
    """The launches of the calls, each specialisation once."""
    count = min(SHARDS * outcome.processes, len(calls))
    shards = [list(range(i, len(calls), count)) for i in range(count)]

    def list_some(indices: list[int]) -> list[tuple[list[Launch], str]]:
        os.putenv("CUDA_VISIBLE_DEVICES", "")  # autograd's engine asks for the number of GPUs, and would start the driver
        _silence()
        return launches_of([calls[i] for i in indices], gpu)

    found: list[list[Launch]] = [[] for _ in calls]
    unseen = dict(enumerate(shards))
    for ended in in_processes(list_some, shards, outcome.processes, deadline):
        indices = unseen.pop(ended.item)
        for i, (launches, error) in zip(indices, ended.result or [([], ended.error)] * len(indices)):
            found[i] = launches
            outcome.unlisted += [(calls[i].name, error)] if error else []
    outcome.unlisted += [(calls[i].name, "no time") for indices in unseen.values() for i in indices]
    return unique(launch for launches in found for launch in launches)


def launches_of(calls: Sequence[Call], gpu: Gpu) -> list[tuple[list[Launch], str]]:
    """(its launches, "" or why the rest cannot be listed) of each call; each specialisation once, by the first that has it."""
    seen: set[tuple[Any, ...]] = set()
    found = []
    for call in calls:
        error = ""
        with listed(gpu, call.dispatched) as launches:
            try:
                call.run()
            except Exception as failure:  # what a call cannot do on fake tensors has many types
                error = said(failure)
        new = [launch for launch in unique(launches) if launch.specialisation() not in seen]
        seen |= {launch.specialisation() for launch in new}
        found.append((new, error))
    return found


def _imports() -> None:
    """Import before the fork what every process needs."""
    import torch._dynamo  # noqa: F401 - autograd.Function and fake tensors import it on first use
    import triton  # noqa: F401
    from triton.backends.nvidia import compiler, driver  # noqa: F401


def _cuda_utilities() -> tuple[Any, str]:
    """(Triton's compiled helper for launchers, ""), or (None, why there is none). No CUDA context comes from it."""
    from triton.backends.nvidia.driver import CudaUtils

    try:
        return CudaUtils(), ""
    except Exception as error:  # no driver library, no C compiler
        return None, said(error)


class _Driver:
    """What JITFunction.warmup and the launchers ask of Triton's driver, answered for a GPU without touching it."""

    def __init__(self, gpu: Gpu, utilities: Any) -> None:
        self.gpu, self.utils = gpu, utilities

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self.gpu.capability
        return GPUTarget("cuda", major * 10 + minor, 32)


def _compile(launch: Launch, gpu: Gpu, utilities: Any) -> bool:
    """Compile one kernel and its launcher; return whether it was in the cache before. In a process of its own."""
    _silence()
    import triton
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver

    driver.set_active(_Driver(gpu, utilities))
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *_, cache_hit=False, **__: hits.append(cache_hit)
    options = dict(launch.options)
    function = launch.function()
    settle(function)
    try:
        compiled = function.warmup(*launch.args, grid=(launch.grid,), **options, enable_fp_fusion=True)
    except Exception:
        if not options.get("WARP_SPECIALIZE"):
            raise
        options["WARP_SPECIALIZE"] = False  # as the launchers do
        compiled = function.warmup(*launch.args, grid=(launch.grid,), **options, enable_fp_fusion=True)
    if utilities is not None:
        CudaLauncher(compiled.src, compiled.metadata)
    return all(hits)  # none: an equal one was compiled in this process


_silent = False


def _silence() -> None:
    """Send what compilers print to nowhere: a failure is told by its exception."""
    global _silent
    if not _silent:
        _silent = True
        sys.stdout.flush()
        sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def gpu_here() -> Gpu | None:
    """The current CUDA device, asked by a process of its own, so that this one stays without a CUDA context; else None."""
    for ended in in_processes(lambda _: Gpu.current() if torch.cuda.is_available() else None, [None], 1):
        return ended.result  # type: ignore[no-any-return]
    return None
