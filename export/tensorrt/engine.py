"""A TensorRT engine on torch tensors.

    with Engine.load("model.engine", sha256=report.sha256) as engine:
        outputs = engine(input_ids=ids, attention_mask=mask)   # {name: tensor}, on the current stream

An engine is a program: loading one that somebody else made runs their code. Pin its SHA-256.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, cuda

from ..files.atomic import ExportError, PathLike, check_onnx, read_input, write_bytes
from ..files.manifest import check_hash
from .backend import EXTRAS, Backend, EngineError, has_gpu, load_backend
from .context import DTYPES, Context, TensorInfo
from .profiles import Range, fits

OP = "Engine.load"
MAX_ENGINE_BYTES = 64 * 2**30
MAX_CACHE_BYTES = 2**30


class Engine:
    """A loaded engine, made by Engine.load. Several threads and streams may use it, each through a context of its own."""

    def __init__(
        self, backend: Backend, native: Any, logger: Any, device: torch.device, manifest: dict[str, Any] | None
    ) -> None:
        self.backend, self.native, self.logger, self.device, self.manifest = backend, native, logger, device, manifest
        modes = backend.module.TensorIOMode
        names = [native.get_tensor_name(index) for index in range(native.num_io_tensors)]
        self.inputs = tuple(self._info(name) for name in names if native.get_tensor_mode(name) == modes.INPUT)
        self.outputs = tuple(self._info(name) for name in names if native.get_tensor_mode(name) == modes.OUTPUT)
        self.profiles = tuple(self._profile(index) for index in range(native.num_optimization_profiles))
        self._runtime_config: Any = None
        self._runtime: Any = None  # must outlive native
        self._cache: tuple[Any, PathLike] | None = None
        self._contexts: dict[int, Context] = {}
        self._open: weakref.WeakSet[Context] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.closed = False

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        sha256: str | None = None,
        backend: str = "auto",
        device: int | str | torch.device = "cuda",
        runtime_cache: PathLike | None = None,
        allow_host_code: bool = False,
        max_bytes: int = MAX_ENGINE_BYTES,
    ) -> Engine:
        """Read an engine file, check its bytes, and load those very bytes.

        Args:
            path: the engine; a manifest beside it, if there is one, must agree with it.
            sha256: what the file's SHA-256 must be, in hexadecimal. None trusts whoever can write to the folder.
            backend: "tensorrt", "tensorrt_rtx" or "auto": what the manifest says, else the first one installed.
            device: the CUDA device.
            runtime_cache: RTX only: file of compiled kernels, read if there is one and written back by close().
            allow_host_code: allow the code that a version-compatible engine carries for the host.
            max_bytes: refuse a larger file.

        Raises:
            ExportError: the file, its hash or its manifest is wrong, or there is no GPU.
            EngineError: TensorRT refuses the engine.
            ModuleNotFoundError: the chosen TensorRT is not installed.
        """
        data = read_input(OP, path, max_bytes=max_bytes)
        manifest = check_hash(OP, path, data, sha256)
        chosen = str(manifest["kind"]) if backend == "auto" and manifest and manifest.get("kind") in EXTRAS else backend
        trt = load_backend(OP, chosen)
        if runtime_cache is not None and not trt.compiles_at_runtime:
            raise ExportError(
                f"{OP}: runtime_cache: not possible with {trt.name}: its kernels are in the engine; use timing_cache"
            )
        if not has_gpu():
            raise ExportError(
                f"{OP}: device: an engine runs on a CUDA device, and torch sees none here (building with RTX needs none)"
            )
        logger, target = trt.logger(), torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if target.type != "cuda":
            raise ExportError(f"{OP}: device: got {target}, allowed: a CUDA device")
        target = torch.device("cuda", cuda.current_device()) if target.index is None else target
        with cuda.device(target):
            runtime = trt.module.Runtime(logger)
            if allow_host_code:
                runtime.engine_host_code_allowed = True
            native = runtime.deserialize_cuda_engine(data)
        if native is None:
            built = f" (built by {manifest['kind']} {manifest.get('versions')})" if manifest else ""
            raise EngineError(f"{OP}: {trt.name} {trt.version} does not load {str(path)!r}{built}:", logger.messages)
        engine = cls(trt, native, logger, target, manifest)
        engine._runtime = runtime
        if runtime_cache is not None:
            engine._attach_runtime_cache(runtime_cache)
        return engine

    def __call__(self, *args: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Run on the current stream, under the first profile that admits the shapes. Inputs by position or by name.

        Returns:
            {name: new tensor}.

        Raises:
            ExportError: an input has a wrong name, dtype, device or shape; the message says what is allowed.
        """
        named = self.bind(args, inputs)
        index = self.profile_for(named)
        with self._lock:
            if index not in self._contexts:
                self._contexts[index] = self.context(index)
        return self._contexts[index].run(named)

    def context(self, profile: int = 0, *, cuda_graph: bool = False) -> Context:
        """A new execution context: its own scratch memory, so that contexts on several streams run at once.

        Args:
            profile: index of the optimisation profile.
            cuda_graph: replay a CUDA graph, captured once for each set of input shapes (at most Context.MAX_GRAPHS kept).
        """
        self.require_open()
        if not 0 <= profile < max(len(self.profiles), 1):
            raise ExportError(f"Engine.context: profile: got {profile}, allowed: 0 to {len(self.profiles) - 1}")
        context = Context(self, profile, cuda_graph)
        self._open.add(context)
        return context

    def bind(self, args: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The arguments by input name; ExportError if a name, type, dtype or device is wrong."""
        self.require_open()
        known = {info.name: info for info in self.inputs}
        if len(args) > len(known):
            raise ExportError(f"Engine: got {len(args)} inputs, allowed: {len(known)}, {', '.join(known)}")
        named = dict(zip(known, args))
        twice, named = sorted(named.keys() & inputs.keys()), named | inputs
        wrong = sorted(named.keys() ^ known.keys())
        if twice or wrong:
            raise ExportError(
                f"Engine: missing, unknown or repeated: {', '.join(twice or wrong)}, allowed: {', '.join(known)}, each once"
            )
        for name, tensor in named.items():
            info = known[name]
            device = torch.device("cpu") if info.on_host else self.device
            if not isinstance(tensor, Tensor) or tensor.dtype != info.dtype or tensor.device != device:
                came = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ExportError(f"Engine: {name}: got {came}, allowed: {info.dtype} on {device}")
        return named

    def moved(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Positional inputs, moved to the device where the engine expects each: its GPU, or the CPU for shape values."""
        where = ["cpu" if info.on_host else self.device for info in self.inputs]
        return [tensor.to(device) for tensor, device in zip(tensors, where)]

    def profile_for(self, named: dict[str, Tensor]) -> int:
        """The first optimisation profile that admits the shapes; ExportError with all of them when none does."""
        for index, profile in enumerate(self.profiles):
            if all(fits(tuple(named[name].shape), ranges) for name, ranges in profile.items()):
                return index
        came = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
        ranges = "; ".join(f"{name} from {r[0]} to {r[2]}" for profile in self.profiles for name, r in profile.items())
        raise ExportError(f"Engine: input shapes: got {came}, allowed: {ranges}")

    def layers(self) -> list[Any]:
        """TensorRT's report on each layer; names only, unless the engine was built with profiling_verbosity="detailed"."""
        self.require_open()
        report = self.native.create_engine_inspector().get_engine_information(self.backend.module.LayerInformationFormat.JSON)
        return list(json.loads(report)["Layers"])

    def refit(self, onnx_path: PathLike) -> None:
        """Replace the weights by those of an ONNX file of the same graph; the engine was built with refit=True.

        Raises:
            ExportError: the file is not valid.
            EngineError: the engine is not refittable, or the weights do not fit.
        """
        self.require_open()
        check_onnx(onnx_path, op="Engine.refit")
        trt = self.backend.module
        with cuda.device(self.device):
            refitter = trt.Refitter(self.native, self.logger)
            parser = trt.OnnxParserRefitter(refitter, self.logger)
            if not parser.refit_from_file(str(onnx_path)) or not refitter.refit_cuda_engine():
                raise EngineError(f"Engine.refit: {str(onnx_path)!r} does not fit:", self.logger.messages)

    def native_context(self, cuda_graph: bool = False) -> Any:
        """A new trt.IExecutionContext. TensorRT-RTX's uses the runtime cache and, for cuda_graph, captures graphs itself."""
        with cuda.device(self.device):
            if self.backend.compiles_at_runtime:
                config = self._runtime_config or self.native.create_runtime_config()
                strategies = self.backend.module.CudaGraphStrategy
                config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graph else strategies.DISABLED
                native = self.native.create_execution_context(config)
            else:
                native = self.native.create_execution_context()
        if native is None:
            raise EngineError("Engine.context: TensorRT created none (is there enough GPU memory?):", self.logger.messages)
        return native

    def close(self) -> None:
        """Wait for the device, save the runtime cache, free the engine. A closed engine refuses to run; closing twice is fine."""
        if self.closed:
            return
        self.closed = True
        cuda.synchronize(self.device)
        cache, self._cache = self._cache, None
        data = bytes(cache[0].serialize()) if cache else b""
        for context in list(self._open):
            context._release()
        self._contexts.clear()
        self._runtime_config = self.native = self._runtime = None
        if cache:
            write_bytes("Engine.close", cache[1], data)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_open(self) -> None:
        if self.closed:
            raise ExportError("Engine: it is closed")

    def _info(self, name: str) -> TensorInfo:
        dtype = self.native.get_tensor_dtype(name).name
        if dtype not in DTYPES:
            raise ExportError(f"{OP}: {name}: dtype {dtype} has no torch dtype, allowed: {', '.join(DTYPES)}")
        host = self.native.get_tensor_location(name) == self.backend.module.TensorLocation.HOST
        return TensorInfo(name, DTYPES[dtype], tuple(self.native.get_tensor_shape(name)), host)

    def _profile(self, index: int) -> dict[str, Range]:
        """(min, opt, max) shapes of the device inputs. A host input holds a shape's values, which TensorRT checks itself."""
        shapes = {info.name: self.native.get_tensor_profile_shape(info.name, index) for info in self.inputs if not info.on_host}
        return {name: (tuple(low), tuple(best), tuple(high)) for name, (low, best, high) in shapes.items()}

    def _attach_runtime_cache(self, path: PathLike) -> None:
        self._runtime_config = self.native.create_runtime_config()
        cache = self._runtime_config.create_runtime_cache()
        if Path(path).exists():  # a cache of another GPU, driver or version is refused by TensorRT and starts empty
            cache.deserialize(read_input(OP, path, max_bytes=MAX_CACHE_BYTES, argument="runtime_cache"))
        if not self._runtime_config.set_runtime_cache(cache):
            raise EngineError(f"{OP}: runtime_cache: refused:", self.logger.messages)
        self._cache = (cache, path)
