"""Execution of an engine: shapes, addresses, output allocation, streams and CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, cuda

from ..files.atomic import ExportError
from .backend import Backend, EngineError
from .profiles import Profile, fits

DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn, "INT8": torch.int8,
    "UINT8": torch.uint8, "INT32": torch.int32, "INT64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an engine. shape has -1 where dynamic. on_host: TensorRT reads or writes it in CPU memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    on_host: bool


class LoadedEngine(Protocol):
    """What a context uses of the Engine that made it."""

    backend: Backend
    device: torch.device
    logger: Any
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: tuple[Profile, ...]

    def bind(self, args: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A call's inputs by name, checked."""

    def native_context(self, cuda_graph: bool = False) -> Any:
        """A new trt.IExecutionContext."""


class Context:
    """One execution context, made by Engine.context. Its calls run in order, on the current stream.

    To overlap calls, run several contexts on several streams. Threads that share a context wait for each other.
    """

    MAX_GRAPHS = 4

    def __init__(self, engine: LoadedEngine, profile: int, cuda_graph: bool) -> None:
        self.engine, self.profile, self._cuda_graph = engine, profile, cuda_graph
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._side = cuda.Stream(engine.device)
        self._native = None if cuda_graph else self._new_native()

    def __call__(self, *args: Tensor, out: Mapping[str, Tensor] | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once.

        Args:
            args, inputs: the engine's inputs, by position or by name, of shapes that this context's profile admits.
            out: tensors to write outputs to, by name; those not named are allocated.

        Returns:
            {name: tensor}. The values are complete when the current stream reaches this point.
        """
        return self.run(self.engine.bind(args, inputs), out)

    def run(self, named: dict[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Like __call__, for inputs that Engine.bind has named and checked."""
        engine = self.engine
        self._check_shapes(named)
        named = {name: tensor.contiguous() for name, tensor in named.items()}
        given = dict(out or {})
        unknown = sorted(given.keys() - {info.name for info in engine.outputs})
        if unknown:
            raise ExportError(f"Engine: out: got {', '.join(unknown)}, allowed: {', '.join(i.name for i in engine.outputs)}")
        with self._lock, cuda.device(engine.device):
            caller = cuda.current_stream(engine.device)
            # TensorRT synchronises the whole device when given the default stream: stand in with a stream of our own.
            stream = self._side if caller == cuda.default_stream(engine.device) else caller
            if stream is not caller:
                stream.wait_stream(caller)
            with cuda.stream(stream):
                replayed = self._cuda_graph
                outputs = self._replay(named, given, stream) if replayed else self._run(self._native, named, given, stream)
            if stream is not caller:
                caller.wait_stream(stream)
                for tensor in (*named.values(), *outputs.values()):
                    if tensor.is_cuda:
                        tensor.record_stream(stream)
                        tensor.record_stream(caller)
        return outputs

    def _run(self, native: Any, named: dict[str, Tensor], given: dict[str, Tensor], stream: Any) -> dict[str, Tensor]:
        """Set input shapes and addresses, allocate outputs of the inferred shapes, and enqueue the execution."""
        self._set_inputs(native, named)
        outputs: dict[str, Tensor] = {}
        unknown: dict[str, Any] = {}
        for info in self.engine.outputs:
            shape = tuple(native.get_tensor_shape(info.name))
            if -1 in shape:  # depends on the data: TensorRT asks for memory while it runs
                unknown[info.name] = native_allocator(self.engine.backend.module, info, self.engine.device)
                native.set_output_allocator(info.name, unknown[info.name])
                continue
            outputs[info.name] = self._output(info, shape, given.get(info.name))
            native.set_tensor_address(info.name, address(outputs[info.name]))
        self._enqueue(native, stream)
        for name, allocator in unknown.items():
            outputs[name] = allocator.result()
            if name in given:
                self._check_out(name, given[name], outputs[name])
                outputs[name] = given[name].copy_(outputs[name])
        return {info.name: outputs[info.name] for info in self.engine.outputs}

    def _replay(self, named: dict[str, Tensor], given: dict[str, Tensor], stream: Any) -> dict[str, Tensor]:
        """Copy the inputs into the buffers of the graph for their shapes, replay it, and copy its outputs out."""
        key = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(named.items()))
        if key not in self._graphs:
            while len(self._graphs) >= self.MAX_GRAPHS:
                stream.synchronize()
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(named, stream)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        for name, tensor in named.items():
            graph.inputs[name].copy_(tensor)
        if graph.graph is None:
            self._enqueue(graph.native, stream)
        else:
            graph.graph.replay()
        results = {}
        for name, tensor in graph.outputs.items():
            if name in given:
                self._check_out(name, given[name], tensor)
                results[name] = given[name].copy_(tensor)
            else:
                results[name] = tensor.clone()
        return results

    def _capture(self, named: dict[str, Tensor], stream: Any) -> _Graph:
        """Capture a CUDA graph with a native context and buffers of its own: a graph is bound to addresses and shapes.

        TensorRT-RTX captures runs on the same addresses itself, because it compiles kernels in the background; for it
        no graph is captured here.

        Raises:
            ExportError: an output's shape depends on the data, or an input lives on the host.
        """
        native = self._new_native()
        inputs = {name: tensor.clone() for name, tensor in named.items()}
        outputs = self._run(native, inputs, {}, stream)  # TensorRT must have run these shapes once before a capture
        if any(-1 in tuple(native.get_tensor_shape(name)) for name in outputs) or any(i.on_host for i in self.engine.inputs):
            raise ExportError(
                "Engine: cuda_graph: not possible: an output's shape depends on the data, or an input lives on the host"
            )
        stream.synchronize()
        if self.engine.backend.compiles_at_runtime:
            return _Graph(None, native, inputs, outputs)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=stream):
            self._enqueue(native, stream)
        return _Graph(graph, native, inputs, outputs)

    def _set_inputs(self, native: Any, named: dict[str, Tensor]) -> None:
        for name, tensor in named.items():
            if not native.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"Engine: {name}: shape {tuple(tensor.shape)} was refused:", self.engine.logger.messages)
            native.set_tensor_address(name, address(tensor))
        missing = native.infer_shapes()
        if missing:
            raise EngineError(f"Engine: not enough is known of {', '.join(missing)}:", self.engine.logger.messages)

    def _enqueue(self, native: Any, stream: Any) -> None:
        if not native.execute_async_v3(stream.cuda_stream):
            raise EngineError("Engine: the execution was refused:", self.engine.logger.messages)

    def _output(self, info: TensorInfo, shape: tuple[int, ...], given: Tensor | None) -> Tensor:
        device = torch.device("cpu") if info.on_host else self.engine.device
        if given is None:
            return torch.empty(shape, dtype=info.dtype, device=device)
        self._check_out(info.name, given, torch.empty(shape, dtype=info.dtype, device="meta"), device)
        return given

    def _check_out(self, name: str, given: Tensor, like: Tensor, device: torch.device | None = None) -> None:
        device = device or like.device
        same = given.shape == like.shape and given.dtype == like.dtype and given.device == device and given.is_contiguous()
        if not same:
            came = f"{given.dtype} {tuple(given.shape)} on {given.device}"
            raise ExportError(
                f"Engine: out[{name!r}]: got {came}, allowed: contiguous {like.dtype} {tuple(like.shape)} on {device}"
            )

    def _check_shapes(self, named: dict[str, Tensor]) -> None:
        profile = self.engine.profiles[self.profile] if self.engine.profiles else {}
        for name, ranges in profile.items():
            low, _, high = ranges
            shape = tuple(named[name].shape)
            if not fits(shape, ranges):
                raise ExportError(f"Engine: {name}: got shape {shape}, allowed by profile {self.profile}: from {low} to {high}")

    def _release(self) -> None:
        """Free the scratch memory and the graphs, for Engine.close."""
        with self._lock:
            self._graphs.clear()
            self._native = None

    def _new_native(self) -> Any:
        native = self.engine.native_context(self._cuda_graph)
        if self.profile and not native.set_optimization_profile_async(self.profile, self._side.cuda_stream):
            raise EngineError(f"Engine.context: profile {self.profile} was refused:", self.engine.logger.messages)
        self._side.synchronize()
        return native


class _Graph:
    """A captured CUDA graph (None if TensorRT-RTX holds it) with its buffers. The native context must outlive the graph."""

    def __init__(self, graph: Any, native: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self.graph, self.native, self.inputs, self.outputs = graph, native, inputs, outputs


def address(tensor: Tensor) -> int:
    """The address of the tensor's data. An empty tensor has a null address, which TensorRT refuses: it gets a dummy one."""
    return tensor.data_ptr() or _nothing(tensor.device).data_ptr()


def _nothing(device: torch.device, kept: dict[torch.device, Tensor] = {}) -> Tensor:  # noqa: B006
    if device not in kept:
        kept[device] = torch.empty(256, dtype=torch.uint8, device=device)
    return kept[device]


def native_allocator(trt: Any, info: TensorInfo, device: torch.device) -> Any:
    """A trt.IOutputAllocator over torch's caching allocator, for an output whose shape depends on the data."""

    class Allocator(trt.IOutputAllocator):
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            if self.buffer.numel() < size:
                self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
            return address(self.buffer)

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return self.reallocate_output_async(tensor_name, memory, size, alignment, 0)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def result(self) -> Tensor:
            count = torch.Size(self.shape).numel()
            return self.buffer[: count * info.dtype.itemsize].view(info.dtype).view(self.shape)

    return Allocator()
