"""torch.cuda on the CPU, for the flow of the benchmarks: streams, events, and captures that are refused for CUDA's reasons.

Tensors asked for on "cuda" lie on the CPU. Each ATen call is a launch on the current stream, and takes a time that follows
from its sizes: the numbers mean nothing. In a capture, launches on another stream, among them those of a backward whose
forward was recorded on another, and everything that makes the host wait, are errors and spoil the capture; what a spoilt
capture leaves behind in torch 2.11 is left behind here. A graph's replay calls again what was recorded.

    with fake_cuda.installed() as gpu: ...                           in a test
    pytest -p tests.bench.fake_cuda bench/test_3_matrix.py           any benchmark, its cases made small
    python -m tests.bench.fake_cuda bench.gpu OUT                    any module; PYTEST_PLUGINS reaches the pytests it starts
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "NVIDIA H100 80GB HBM3"
LAUNCH_S, BANDWIDTH, RATE = 1.5e-6, 3e12, 6e14
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero", "item")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "linear")
SPOILT = "CUDA error: operation failed due to a previous error during capture"


class Stream:
    """A stream; work on it is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.gpu = GPU.now

    def wait_stream(self, other: Stream) -> None:
        graph = self.gpu.capturing
        if graph is not None and other is not self and graph.stream in (self, other):
            self.gpu.refuse("CUDA error: dependency created on uncaptured work in another stream")

    def synchronize(self) -> None:
        self.gpu.synchronize()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        pass


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.gpu, self.at = GPU.now, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = self.gpu.seconds

    def synchronize(self) -> None:
        self.gpu.synchronize()

    def query(self) -> bool:
        self.gpu.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Graph:
    """A CUDAGraph: the ATen calls between capture_begin and capture_end, with the tensors they read and wrote."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.gpu, self.stream = GPU.now, GPU.now.current
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, float]] = []
        self.begun = self.spoilt = self.complete = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        if self.begun:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        if self.gpu.capturing is not None:
            self.gpu.refuse("CUDA error: operation not permitted when stream is capturing")
        if self.gpu.current is self.gpu.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.begun, self.stream, self.gpu.capturing = True, self.gpu.current, self
        self.gpu.open_pool = self.gpu.generator.capturing = True
        self.gpu.captures += 1

    def capture_end(self) -> None:
        if self.gpu.capturing is not self:
            raise RuntimeError("CUDA error: stream is not capturing")
        if self.gpu.current is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self.gpu.capturing = None
        if self.spoilt:  # the pool stays open and the generator capturing
            raise RuntimeError(SPOILT)
        self.gpu.open_pool = self.gpu.generator.capturing = False
        self.complete = True
        for *_, out, _ in self.calls:  # nothing has run yet on a real GPU
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.detach().fill_(float("nan"))

    def replay(self) -> None:
        if not self.complete:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if self.gpu.capturing is not None:
            self.gpu.refuse("CUDA error: operation not permitted when stream is capturing")
        with self.gpu.unseen(), torch.no_grad():
            for func, args, kwargs, out, seconds in self.calls:
                again = func(*args, **kwargs)
                self.gpu.seconds += seconds
                for old, new in zip(tree_leaves(out), tree_leaves(again)):
                    if isinstance(old, Tensor):
                        old.detach().copy_(new)

    def reset(self) -> None:
        self.calls, self.complete = [], False


class Generator:
    """The GPU's random number generator: after a spoilt capture it draws no number until its state is replaced."""

    def __init__(self) -> None:
        self.capturing = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, other: Generator) -> None:
        self.capturing = other.capturing


class graph:  # noqa: N801 - torch.cuda.graph, as torch 2.11 has it
    def __init__(self, cuda_graph: Graph, pool: Any = None, stream: Stream | None = None, **_: Any) -> None:
        self.graph, self.stream = cuda_graph, stream or Stream()

    def __enter__(self) -> None:
        self.before, self.graph.gpu.current = self.graph.gpu.current, self.stream
        self.graph.capture_begin()

    def __exit__(self, *_: Any) -> None:
        self.graph.capture_end()  # when this raises, the stream stays as it is
        self.graph.gpu.current = self.before


class GPU:
    """The state of the device. seconds: its clock; captures, launches: how many there were; current: the stream."""

    now: GPU

    def __init__(self) -> None:
        GPU.now = self
        self.seconds, self.captures, self.launches = 0.0, 0, 0
        self.capturing: Graph | None = None
        self.generator, self.open_pool = Generator(), False
        self.default = self.current = Stream()
        self.modes: tuple[_Launches, _Devices] = (_Launches(self), _Devices(self))

    def refuse(self, message: str) -> None:
        """Spoil the capture and raise."""
        if self.capturing is not None:
            self.capturing.spoilt = True
        raise RuntimeError(message)

    def synchronize(self, *_: Any) -> None:
        if self.capturing is not None:
            self.refuse("CUDA error: operation not permitted when stream is capturing")

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Inside, ATen calls are no launches."""
        before, self.modes[0].on = self.modes[0].on, False
        try:
            yield
        finally:
            self.modes[0].on = before

    def end_pool(self, device: int, pool: Any) -> None:
        if not self.open_pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pool = False

    def launch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in WAITING:
            self.synchronize()
        if torch.Tag.nondeterministic_seeded in func.tags and self.generator.capturing and self.capturing is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if self.capturing is not None and self.current is not self.capturing.stream:
            self.refuse("CUDA error: operation would make the legacy stream depend on a capturing blocking stream")
        out = func(*args, **kwargs)
        returns = func._schema.returns
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return out  # a view
        self.launches += 1
        seconds = _seconds(name, args, out)
        if self.capturing is None:
            self.seconds += seconds
        else:
            fresh = out if all(r.alias_info is None for r in returns) else None
            self.capturing.calls.append((func, args, kwargs, fresh, seconds))
        return out

    def backward(self, run: Callable[..., Any], roots: Any, *args: Any, **kwargs: Any) -> Any:
        """Autograd's engine: each node's work goes to the stream that was current when the node was made."""
        streams = {node.metadata.get("stream", self.current) for node in _nodes(roots)}
        if self.capturing is not None and streams - {self.capturing.stream}:
            self.refuse("CUDA error: operation would make the legacy stream depend on a capturing blocking stream")
        return run(roots, *args, **kwargs)


def _seconds(name: str, args: tuple[Any, ...], out: Any) -> float:
    """A made-up time of a launch, from the bytes and FLOPs in it."""
    tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
    flops = 0.0
    if name in PRODUCTS and isinstance(out, Tensor):
        inner = next((t.shape[-1] for t in tensors if t.dim() > 1), 1)
        flops = 2.0 * out.numel() * inner
    return LAUNCH_S + max(sum(t.numel() * t.element_size() for t in tensors) / BANDWIDTH, flops / RATE)


def _nodes(tensors: Any, marked: bool = True) -> list[Any]:
    """The nodes of autograd's graph behind tensors; with marked=False those without a stream, down to the first that has one."""
    todo = [t.grad_fn for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.grad_fn is not None]
    found: dict[Any, None] = {}
    while todo:
        node = todo.pop()
        if node is not None and node not in found and (marked or "stream" not in node.metadata):
            found[node] = None
            todo += [following for following, _ in node.next_functions]
    return list(found)


class _Launches(TorchDispatchMode):
    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.gpu, self.on = gpu, True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self.gpu.launch(func, args, kwargs or {}) if self.on else func(*args, **(kwargs or {}))


class _Devices(TorchFunctionMode):
    """Puts what is asked for on "cuda" on the CPU, and notes the stream on which autograd's nodes are made."""

    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        args, kwargs = tree_map(_on_cpu, args), tree_map(_on_cpu, kwargs or {})
        if func is torch._scaled_mm:
            func = _scaled_mm
        return self.gpu_made(func(*args, **kwargs))

    def gpu_made(self, out: Any) -> Any:
        for node in _nodes(out, marked=False):
            node.metadata["stream"] = self.gpu.current
        return out


def _scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    """torch._scaled_mm, which a CPU does not have with a scale for each row."""
    product = (a.float() * scale_a) @ (b.float() * scale_b)
    return (product if bias is None else product + bias).to(out_dtype or a.dtype)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _fakes(gpu: GPU) -> dict[str, Any]:
    """torch.cuda's names as they are here."""
    properties = SimpleNamespace(
        name=NAME, L2_cache_size=50 << 20, multi_processor_count=132, major=9, minor=0, total_memory=80 << 30, warp_size=32,
        shared_memory_per_block_optin=232448,
    )  # fmt: skip
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "is_initialized": lambda: True,
        "init": lambda: None, "get_device_name": lambda *_: NAME, "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0), "mem_get_info": lambda *_: (70 << 30, 80 << 30),
        "memory_allocated": lambda *_: 0, "memory_reserved": lambda *_: 0, "max_memory_allocated": lambda *_: 4096,
        "reset_peak_memory_stats": lambda *_: None, "empty_cache": lambda: None, "manual_seed_all": lambda seed: None,
        "synchronize": gpu.synchronize, "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph,
        "stream": gpu.stream, "set_stream": gpu.set_stream, "current_stream": lambda *_: gpu.current,
        "default_stream": lambda *_: gpu.default, "graph_pool_handle": lambda: (0, 1), "default_generators": (gpu.generator,),
        "is_current_stream_capturing": lambda: gpu.capturing is not None and gpu.current is gpu.capturing.stream,
        "device": lambda *_: contextlib.nullcontext(), "_sleep": lambda cycles: None, "is_bf16_supported": lambda *_: True,
    }  # fmt: skip


@contextlib.contextmanager
def installed() -> Iterator[GPU]:
    """Inside, torch.cuda is the fake."""
    from bench import timing

    gpu = GPU()
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    apply = inspect.getattr_static(torch.autograd.Function, "apply")  # in Python, and from torch 2.14 on in C
    with contextlib.ExitStack() as stack:
        for name, value in _fakes(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, function in (("_cuda_endAllocateToPool", gpu.end_pool), ("_cuda_releasePool", lambda *_: None)):
            stack.enter_context(mock.patch.object(torch._C, name, function, create=True))
        engine = lambda *args, **kwargs: gpu.backward(run, *args, **kwargs)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", engine))
        made = classmethod(lambda cls, *args, **kwargs: gpu.modes[1].gpu_made(apply.__get__(None, cls)(*args, **kwargs)))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", made))
        for cache in (timing._stream, timing._spun):
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        stack.enter_context(mock.patch.object(timing, "SPIN_N", 16))
        for mode in gpu.modes:
            stack.enter_context(mode)
        yield gpu


_FOR_GOOD = contextlib.ExitStack()


@functools.cache
def install() -> GPU:
    """Make torch.cuda the fake for the rest of the process, and the benchmarks small. The second time does nothing."""
    from tests.bench import made_small

    gpu = _FOR_GOOD.enter_context(installed())
    made_small.make_small()
    return gpu


def pytest_load_initial_conftests() -> None:
    """As a plugin: before any benchmark asks whether there is a GPU."""
    install()


if __name__ == "__main__":
    from tests.bench import fake_cuda

    fake_cuda.install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
