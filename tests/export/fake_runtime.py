"""A FAKE TensorRT runtime and a FAKE torch.cuda, on CPU memory, for the plumbing of Engine where there is no GPU.

The fake engine's one program is y = 2 x, written through the very addresses that Engine hands over, after the checks
that TensorRT makes: shapes set, addresses set, non-null, not the default stream. `calls` keeps the order of calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import json
from types import SimpleNamespace
from typing import Any

import torch

PROFILES = [((1, 4), (2, 4), (8, 4)), ((9, 4), (16, 4), (64, 4))]


class FakeStream:
    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self.cuda, self.cuda_stream = cuda, handle

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.calls.append(("wait", self.cuda_stream, other.cuda_stream))

    def synchronize(self) -> None:
        self.cuda.calls.append(("synchronize", self.cuda_stream))


class FakeGraph:
    def __init__(self) -> None:
        self.launches: list[Any] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


class FakeCuda:
    """Streams by number, 0 the default one; a capture records launches instead of running them."""

    CUDAGraph = FakeGraph

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.streams = [FakeStream(self, 0)]
        self.current, self.capturing = self.streams[0], None

    def Stream(self, device: Any = None) -> FakeStream:  # noqa: N802
        self.streams.append(FakeStream(self, len(self.streams)))
        return self.streams[-1]

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        self.calls.append(("synchronize device",))

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.current

    def default_stream(self, device: Any = None) -> FakeStream:
        return self.streams[0]

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, stream: FakeStream) -> Any:
        self.capturing = graph
        yield
        self.capturing = None

    def launch(self, launch: Any) -> None:
        if self.capturing is None:
            launch()
        else:
            self.capturing.launches.append(launch)


class FakeContext:
    def __init__(self, engine: FakeEngine, config: Any = None) -> None:
        self.engine, self.config, self.cuda = engine, config, engine.cuda
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.allocator: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.cuda.calls.append(("profile", index))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 4) if name == "y" and self.engine.data_dependent else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address != 0, "TensorRT refuses null"
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocator = allocator
        return True

    def infer_shapes(self) -> list[str]:
        return [] if "x" in self.addresses else ["x"]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream != 0, "the default stream makes TensorRT synchronise the device"
        if self.engine.fails:
            self.engine.logger.log(Severity.ERROR, "a fake failure")
            return False
        self.cuda.calls.append(("execute", stream, self.shape))
        count = torch.Size(self.shape).numel()
        if self.allocator is not None:
            self.addresses["y"] = self.allocator.reallocate_output_async("y", 0, count * 4, 256, stream)
            self.allocator.notify_shape("y", self.shape)
        source, target = self.addresses["x"], self.addresses["y"]

        def program() -> None:
            floats = ctypes.c_float * count
            floats.from_address(target)[:] = [2 * value for value in floats.from_address(source)]

        self.cuda.launch(program)
        return True


class FakeConfig:
    cuda_graph_strategy: Any = None
    cache: Any = None

    def create_runtime_cache(self) -> Any:
        loaded: list[bytes] = []
        return SimpleNamespace(loaded=loaded, deserialize=loaded.append, serialize=lambda: b"".join(loaded) + b"+kernels")

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    """Two profiles, one input and one output of float32 (rows, 4)."""

    num_io_tensors = 2
    num_optimization_profiles = 2

    def __init__(self, cuda: FakeCuda, logger: Any, data_dependent: bool = False) -> None:
        self.cuda, self.logger, self.data_dependent, self.fails = cuda, logger, data_dependent, False
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> Any:
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_location(self, name: str) -> Any:
        return Location.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 4)

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return PROFILES[index]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": ["product", "activation"]}))


class Mode(enum.Enum):
    INPUT, OUTPUT = 1, 2


class Location(enum.Enum):
    DEVICE, HOST = 0, 1


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity


def fake_runtime(cuda: FakeCuda, *, rtx: bool, loads: bool = True) -> Any:
    """A module object with a Runtime. rtx: with the members that only TensorRT-RTX has."""
    config = type("IBuilderConfig", (), {"set_compute_capability": None} if rtx else {})

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            cuda.calls.append(("deserialize", data))
            if not loads:
                self.logger.log(Severity.ERROR, "a fake version mismatch")
            return FakeEngine(cuda, self.logger) if loads else None

    return SimpleNamespace(
        __version__="1.7.1" if rtx else "10.16",
        ILogger=ILogger,
        IOutputAllocator=object,
        IBuilderConfig=config,
        Runtime=Runtime,
        TensorIOMode=Mode,
        TensorLocation=Location,
        LayerInformationFormat=SimpleNamespace(JSON=1),
        CudaGraphStrategy=SimpleNamespace(DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole"),
    )
