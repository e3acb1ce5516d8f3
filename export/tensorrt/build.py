"""Build engines with `tensorrt` 10 and 11 and with `tensorrt_rtx`. Networks are strongly typed: precision is the ONNX graph's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import ExportError, PathLike, check_onnx, check_writable, output, sha256_of, write_bytes
from ..files.manifest import external_files, write_manifest
from . import config as config_module
from .backend import Backend, EngineError, gpu_properties, load_backend, network_flags, parser_errors
from .config import BuildOptions
from .engine import Engine
from .profiles import GraphTensor, Profile, add_profiles, check_profiles, check_text, graph_inputs, graph_outputs
from .progress import ProgressFn, Watch, native_monitor, watching

OP = "build_engine"

__all__ = ["Engine", "EngineError", "EngineReport", "build_engine"]


@dataclass(frozen=True)
class EngineReport:
    """What build_engine wrote. manifest: the content of the file beside the engine. warnings: what TensorRT logged."""

    path: Path
    sha256: str
    bytes: int
    backend: str
    version: str
    seconds: float
    manifest: dict[str, Any]
    warnings: tuple[str, ...]


def build_engine(
    onnx_path: PathLike,
    engine_path: PathLike,
    *,
    backend: str = "auto",
    profiles: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    compute_capability: Sequence[str] | str = (),
    memory_pools: Mapping[str, int] | None = None,
    max_aux_streams: int | None = None,
    optimization_level: int | None = None,
    hardware_compatibility: str = "none",
    version_compatible: bool = False,
    refit: bool = False,
    strip_weights: bool = False,
    timing_cache: PathLike | None = None,
    profiling_verbosity: str = "layer_names_only",
    tf32: bool = False,
    progress: bool | ProgressFn | None = None,
    verbose: bool = False,
) -> EngineReport:
    """Build a TensorRT engine from an ONNX file, and write it with a manifest (`<engine_path>.manifest.json`) beside it.

    Args:
        onnx_path: the model; onnx's checker reads it, external data included, before TensorRT's parser does.
        engine_path: where the engine goes, whole or not at all: when the build fails an existing file stays as it is.
        backend: "tensorrt", "tensorrt_rtx", or "auto" (`tensorrt` first where there is a GPU, else `tensorrt_rtx`, which
            needs none to build).
        profiles: one dict, or one for each optimisation profile, of {input: (min, opt, max)}, three shapes each; for an
            input that the graph reads as a shape, three lists of values. Static inputs may be left out.
        compute_capability: RTX only: GPUs to build for, as "8.9" or "current"; () builds for every GPU that RTX supports.
        memory_pools: bytes by pool, such as {"workspace": 1 << 30}.
        max_aux_streams: streams beside the caller's that the engine may use; 0 for none; None leaves it to TensorRT.
        optimization_level: 0 (fastest build) to 5 (most tactics timed); None is TensorRT's default, 3. Not RTX.
        hardware_compatibility: "none", "ampere_plus" or "same_compute_capability". Not RTX.
        version_compatible: the engine carries a lean runtime and runs under later versions. Not RTX.
        refit: weights can be replaced later (Engine.refit). Needs a GPU.
        strip_weights: leave the weights out; Engine.refit puts them back. Needs a GPU.
        timing_cache: file of tactic timings, read if there is one and written back. Not RTX: see Engine.load.
        profiling_verbosity: "layer_names_only", "detailed" (for Engine.layers) or "none".
        tf32: allow TF32 in fp32 matrix products; off by default, as in torch.
        progress: True for a bar (needs rich), a function (phase, step, steps) that cancels by returning False, False for
            nothing; None shows the bar on a terminal. Ctrl-C cancels: nothing is written, then KeyboardInterrupt.
        verbose: keep all of TensorRT's messages, not only warnings and errors.

    Returns:
        EngineReport.

    Raises:
        ExportError: a bad argument, profile, or ONNX file, or an option that this TensorRT cannot do, with the reason.
        EngineError: the parser or the builder failed. It carries TensorRT's messages, parser errors with node and operator.
        ModuleNotFoundError: the chosen TensorRT is not installed.
    """
    target = check_writable(OP, engine_path)
    names = (compute_capability,) if isinstance(compute_capability, str) else tuple(compute_capability)
    options = BuildOptions(
        compute_capability=names, memory_pools=dict(memory_pools or {}), max_aux_streams=max_aux_streams,
        optimization_level=optimization_level, hardware_compatibility=hardware_compatibility, refit=refit, tf32=tf32,
        version_compatible=version_compatible, strip_weights=strip_weights, timing_cache=timing_cache,
        profiling_verbosity=profiling_verbosity,
    )  # fmt: skip
    if timing_cache is not None:
        check_writable(OP, timing_cache)
    model = check_onnx(onnx_path, op=OP)
    check_text(OP, onnx_path, model)
    inputs = graph_inputs(model)
    checked = check_profiles(OP, inputs, profiles)
    trt = load_backend(OP, backend)
    config_module.check_options(OP, trt, options)

    logger, started = trt.logger(verbose), time.perf_counter()
    plan, cache = _build(trt, logger, Path(onnx_path), checked, options, progress)
    seconds = time.perf_counter() - started
    with output(OP, target) as staged:
        staged.write_bytes(plan)
        manifest = write_manifest(
            staged,
            trt.name,
            versions={trt.name: trt.version},
            source=_source(Path(onnx_path)),
            opset={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
            inputs=[_port(tensor) for tensor in inputs],
            outputs=[_port(tensor) for tensor in graph_outputs(model)],
            profiles=checked,
            options=options.as_dict(),
            gpu=None if trt.compiles_at_runtime and "current" not in names else gpu_properties(),
        )
    if cache is not None and timing_cache is not None:
        write_bytes(OP, timing_cache, cache)
    warnings = tuple(line for line in logger.messages if not line.startswith("error"))
    return EngineReport(target, manifest["sha256"], len(plan), trt.name, trt.version, seconds, manifest, warnings)


def _source(path: Path) -> dict[str, Any]:
    """The ONNX file's name and SHA-256, and the SHA-256 of each of its external data files."""
    external = {name: sha256_of(path.parent / name) for name in external_files(path)}
    return {"file": path.name, "sha256": sha256_of(path)} | ({"external_data": external} if external else {})


def _port(tensor: GraphTensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "dims": list(tensor.dims)}


def _build(
    backend: Backend, logger: Any, onnx_path: Path, profiles: Sequence[Profile], options: BuildOptions, progress: Any
) -> tuple[bytes, bytes | None]:
    """The serialised engine, and the serialised timing cache if there is one. TensorRT's failures return None and never raise."""
    # Ctrl-C is caught from here on: raised inside TensorRT's calls of the logger, a KeyboardInterrupt would be lost.
    with watching(progress, onnx_path.name) as watch:
        plan, cache = _parse_and_build(backend, logger, onnx_path, profiles, options, watch)
    if watch.cancelled:
        raise ExportError(f"{OP}: cancelled by progress")
    if plan is None:
        raise EngineError(f"{OP}: {backend.name} {backend.version} built no engine from {str(onnx_path)!r}:", logger.messages)
    return bytes(plan), bytes(cache.serialize()) if cache is not None else None


def _parse_and_build(
    backend: Backend, logger: Any, onnx_path: Path, profiles: Sequence[Profile], options: BuildOptions, watch: Watch
) -> tuple[Any, Any]:
    trt = backend.module
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = parser_errors(parser) or logger.messages
        raise EngineError(f"{OP}: {backend.name} cannot parse {str(onnx_path)!r}:", errors)
    config = builder.create_builder_config()
    config_module.configure(OP, backend, config, options)
    add_profiles(OP, builder, network, config, profiles)
    cache = config_module.attach_timing_cache(OP, config, options.timing_cache)
    config.progress_monitor = native_monitor(trt, watch)
    return (None if watch.cancelled else builder.build_serialized_network(network, config)), cache
