"""Time on a GPU: CUDA-graph replays over rotating buffers for kernels, and the wall clock for a call as Python sees it."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .patience import TooSlow

Step = Callable[[], Sequence[Tensor]]
"""Runs one call on one set of arguments and returns its results. A step that keeps something from one call to the next, such
as the forward whose backward it runs, has a method forget() that drops it: what is kept belongs to the stream it was made on."""

TARGET_S = 0.06  # device time spent on one measurement's samples
MIN_SAMPLES, MAX_SAMPLES = 10, 100
WARMUP = 3
GRAPH_S = 4e-4  # a graph is no shorter: the device's time to begin one would show in the mean of a few steps
MAX_CYCLES = 16
LEAD_CYCLES = 200_000  # of the SM clock, about 0.1 ms: the device waits while the host launches what is timed
SPIN_S = 0.02
SPIN_N = 4096


class DeviceClock:
    """pytest-benchmark's timer for kernel times: a clock that moves only by the device times that it is given."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


@functools.cache
def _stream() -> torch.cuda.Stream:
    """The one stream beside the default stream that everything is warmed up, captured and replayed on."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def side_stream() -> Iterator[torch.cuda.Stream]:
    """Inside, the current stream is the one that captures. The stream before is restored, whatever fails inside.

    The two wait for each other on the way in and out. Autograd runs a backward on the stream of its forward, so a forward
    whose backward is to be captured must be recorded in here.
    """
    before, stream = torch.cuda.current_stream(), _stream()
    stream.wait_stream(before)
    torch.cuda.set_stream(stream)
    try:
        yield stream
    finally:
        torch.cuda.set_stream(before)
        before.wait_stream(stream)


class Replay:
    """One replay of all steps, captured in a CUDA graph where that works and else launched one by one.

    Warm-up, capture and replays run on one side stream, and so does what steps keep. A graph of short steps holds several
    cycles over them. Steps of one cycle write to different memory, and the results of the last cycle stay readable: check
    them after a replay.

    Attributes:
        method: "graph" or "events". Times of the two are not comparable: the second has the host's launches in it.
        why_no_graph: the reason for "events"; else "".
        count: how many calls of a step one replay makes.

    Raises:
        Exception: whatever a step raises outside a capture. A capture that fails raises nothing.
    """

    def __init__(self, steps: Sequence[Step], no_graph: str = "") -> None:
        self.steps = list(steps)
        self.results: list[Sequence[Tensor]] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.count = len(self.steps)
        self.why_no_graph = f"no CUDA graph: {no_graph}" if no_graph else ""
        with side_stream():
            self._warm_up()
            if not no_graph:
                try:
                    self._capture()
                except TooSlow:
                    raise
                except Exception as error:
                    self.graph, self.count = None, len(self.steps)
                    message = (str(error).strip().splitlines() or [""])[0]
                    self.why_no_graph = f"no CUDA graph: {type(error).__name__}: {message[:120]}"
                    self._warm_up()  # what steps kept in a failed capture is of no use
            if self.graph is None:
                self._replay()
        torch.cuda.synchronize()

    @property
    def method(self) -> str:
        return "graph" if self.graph is not None else "events"

    def _warm_up(self) -> None:
        self.results = []
        for step in self.steps:
            getattr(step, "forget", lambda: None)()
        for _ in range(WARMUP - 1):
            self.steps[0]()
        for step in self.steps:
            step()

    def _capture(self) -> None:
        free, total = torch.cuda.mem_get_info()
        if free < total // 3:  # in a capture the allocator cannot give back what it caches
            torch.cuda.empty_cache()
        try:
            self.graph, self.results = capture(self.steps, 1)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.graph, self.results = capture(self.steps, 1)
        self.run()  # the first launch uploads the graph
        cycles = min(MAX_CYCLES, math.ceil(GRAPH_S / max(self.sample() * len(self.steps), 1e-9)))
        if cycles > 1:
            self.graph, self.results = None, []
            self.graph, self.results = capture(self.steps, cycles)
            self.count = cycles * len(self.steps)
            self.run()

    def poison(self, keep: Collection[int] = ()) -> None:
        """Fill the results with NaN, so that an element the next replay does not write shows.

        keep: addresses left alone, those of the arguments, which a wrong provider may return as its result.
        """
        with side_stream():
            for result in self.results:
                for tensor in result:
                    if tensor.is_floating_point() and tensor.data_ptr() not in keep:
                        tensor.detach().fill_(float("nan"))

    def run(self) -> None:
        """One replay."""
        with side_stream():
            self._replay()

    def _replay(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.results = [step() for step in self.steps]

    def sample(self) -> float:
        """Device seconds of one step, the mean over one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with side_stream():
            torch.cuda._sleep(LEAD_CYCLES * (1 if self.graph is not None else min(len(self.steps), 20)))
            start.record()
            self._replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.count

    def rounds(self) -> int:
        """How many samples to take; call it right before them, since it brings the clocks up."""
        spin()
        return sample_count(self.sample(), self.count)

    def series(self, samples: int | None = None, warm_s: float | None = None) -> list[float]:
        """Seconds of one step, a sample a replay, after warm_s of other work. samples: None for as many as TARGET_S takes."""
        spin(SPIN_S if warm_s is None else warm_s)
        samples = sample_count(self.sample(), self.count) if samples is None else samples
        return [self.sample() for _ in range(samples)]


def capture(steps: Sequence[Step], cycles: int) -> tuple[torch.cuda.CUDAGraph, list[Sequence[Tensor]]]:
    """A CUDA graph of the steps, cycles times over, on the current stream, and the results of the last cycle.

    A result lives until its step comes again, so that each step's output finds other memory, outside L2 like its input.
    torch.cuda.graph is not used: it empties the allocator's cache, and in torch 2.11 leaves its stream current when a
    capture fails. After a failure here the stream, the allocator and the random number generator are as before.
    """
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    results: list[Sequence[Tensor]] = [()] * len(steps)
    torch.cuda.synchronize()
    collecting, complete = gc.isenabled(), False
    gc.disable()  # what is collected in a capture may be another graph, or memory of another stream
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        for _ in range(cycles):
            for i, step in enumerate(steps):
                results[i] = ()
                results[i] = step()
        torch.cuda.set_stream(stream)
        graph.capture_end()
        complete = True
    finally:
        if collecting:
            gc.enable()
        if not complete:
            results.clear()
            _abandon(graph, pool, stream)
    return graph, results


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """End a capture that failed, wherever that was, and undo what capture_end leaves undone when it raises.

    Otherwise the allocator could no longer free its cache, and torch.randn would refuse to work on this GPU.
    """
    torch.cuda.set_stream(stream)
    with contextlib.suppress(Exception):
        graph.capture_end()
    with contextlib.suppress(Exception):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)  # refused when capture_end came so far
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    with contextlib.suppress(Exception):
        graph.reset()
    with contextlib.suppress(Exception):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())  # a clone is not capturing
    with contextlib.suppress(Exception):
        torch.cuda.synchronize()  # a lost context raises again in whatever comes next


def sample_count(first: float, steps: int) -> int:
    """How many replays to time, given the seconds of one step and the steps of a replay."""
    return max(MIN_SAMPLES, min(MAX_SAMPLES, int(TARGET_S / max(first * steps, 1e-9))))


@functools.cache
def _spun(n: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, n, dtype=torch.bfloat16, device="cuda"), torch.empty(n, n, dtype=torch.bfloat16, device="cuda")


def spin(seconds: float = SPIN_S) -> None:
    """Multiply matrices of zeros for so long: an idle GPU's clocks rise, and little power is drawn. Nothing without a GPU.

    Every series of samples begins with it: an idle H100 runs at a fifth of its clock.
    """
    if not torch.cuda.is_available():
        return
    operand, product = _spun(SPIN_N)
    end = time.perf_counter() + seconds
    while True:
        for _ in range(4):
            torch.mm(operand, operand, out=product)
        torch.cuda.synchronize()
        if time.perf_counter() >= end:
            return


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
    if device.startswith("cuda"):
        spin()
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
    with side_stream():
        result: Any = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak
