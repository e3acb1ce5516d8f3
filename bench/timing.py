"""Time on a GPU: CUDA-graph replays over rotating buffers for kernels, and the wall clock for a call as Python sees it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Sequence[Tensor]]
"""Runs one call on one set of arguments and returns its results."""

TARGET_S = 0.06  # device time spent on one measurement's samples
MIN_SAMPLES, MAX_SAMPLES = 10, 100
WARMUP = 3


class DeviceClock:
    """pytest-benchmark's timer for kernel times: a clock that moves only by the device times that it is given."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


class Replay:
    """One replay of all steps, captured in a CUDA graph where that works and else launched one by one.

    Steps of one graph write to different memory, and their results stay readable: check them after a replay.
    """

    def __init__(self, steps: Sequence[Step], no_graph: str = "") -> None:
        self.steps = steps
        self.graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        self.why_no_graph = ""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                for step in steps:
                    step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        gc.collect()
        try:
            if no_graph:
                raise RuntimeError(no_graph)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.results = [step() for step in steps]
        except Exception as error:
            self.graph = None
            self.why_no_graph = f"no CUDA graph: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            torch.cuda.synchronize()
            self.results = [step() for step in steps]
        torch.cuda.synchronize()

    @property
    def method(self) -> str:
        return "graph" if self.graph is not None else "events"

    def poison(self, keep: Collection[int] = ()) -> None:
        """Fill the results with NaN, so that an element the next replay does not write shows.

        keep: addresses left alone, those of the arguments, which a wrong provider may return as its result.
        """
        for result in self.results:
            for tensor in result:
                if tensor.is_floating_point() and tensor.data_ptr() not in keep:
                    tensor.detach().fill_(float("nan"))

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.results = [step() for step in self.steps]

    def sample(self) -> float:
        """Device seconds of one step, the mean over one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(self.steps)


def sample_count(first: float, steps: int) -> int:
    """How many replays to time, given the seconds of one step."""
    return max(MIN_SAMPLES, min(MAX_SAMPLES, int(TARGET_S / max(first * steps, 1e-9))))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def wall_samples(
    step: Step, device: str, calls: int = 50, samples: int = 40, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Wall seconds a call, each sample the mean of calls back-to-back calls that end in one synchronisation.

    On a GPU this is the larger of host time and device time: what an eager loop over the op takes. clock: another clock,
    such as time.process_time on a shared machine's CPU.
    """
    for _ in range(2 * WARMUP):
        step()
    result = []
    for _ in range(samples):
        synchronize(device)
        start = clock()
        for _ in range(calls):
            step()
        synchronize(device)
        result.append((clock() - start) / calls)
    return result


def peak_bytes(step: Step) -> int:
    """Device memory that one call allocates at its peak, over what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result: Any = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak
