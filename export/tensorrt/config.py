"""Build options: checked against what the chosen TensorRT can do, then set on IBuilderConfig. None is silently ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files.atomic import ExportError, PathLike, read_input
from .backend import Backend, has_gpu

MAX_CACHE_BYTES = 2**30
RUNS_LATER = "TensorRT-RTX compiles kernels where the engine runs"


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build; build_engine documents each field."""

    compute_capability: tuple[str, ...] = ()
    memory_pools: Mapping[str, int] = field(default_factory=dict)
    max_aux_streams: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    strip_weights: bool = False
    timing_cache: PathLike | None = None
    profiling_verbosity: str = "layer_names_only"
    tf32: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON-serialisable data for the manifest, without timing_cache, a path of the build machine."""
        options = asdict(self)
        options.pop("timing_cache")
        return options | {"compute_capability": list(self.compute_capability), "memory_pools": dict(self.memory_pools)}


def members(enum: Any) -> dict[str, Any]:
    """A bound enum's members by lower-case name."""
    return {name.lower(): value for name, value in enum.__members__.items()}


def check_options(op: str, backend: Backend, options: BuildOptions) -> None:
    """Check the options before anything is parsed.

    Raises:
        ExportError: an option is out of range, or this TensorRT cannot do it; the message gives the reason.
    """
    trt, rtx, gpu = backend.module, backend.compiles_at_runtime, has_gpu()
    no_gpu = None if gpu else "needs a GPU at build time, and there is none here"
    refusals: list[tuple[str, object, str | None]] = [
        ("compute_capability", options.compute_capability, None if rtx else "this TensorRT builds for the GPU it runs on"),
        ("timing_cache", options.timing_cache, f"{RUNS_LATER}: use Engine.load(..., runtime_cache=FILE)" if rtx else None),
        (
            "optimization_level",
            options.optimization_level is not None,
            f"{RUNS_LATER} and times none at build: levels 0 and 5 gave engines of the same bytes" if rtx else None,
        ),
        (
            "hardware_compatibility",
            options.hardware_compatibility != "none",
            "TensorRT-RTX has none: name the GPUs in compute_capability" if rtx else None,
        ),
        (
            "version_compatible",
            options.version_compatible,
            "TensorRT-RTX ships no lean runtime to put into the engine" if rtx else None,
        ),
        ("refit", options.refit, no_gpu),
        ("strip_weights", options.strip_weights, no_gpu),
    ]
    for name, wanted, reason in refusals:
        if wanted and reason:
            raise ExportError(f"{op}: {name}: not possible with {backend.name} {backend.version}: {reason}")
    _check_ranges(op, options)
    _member(op, "hardware_compatibility", trt.HardwareCompatibilityLevel, options.hardware_compatibility)
    _member(op, "profiling_verbosity", trt.ProfilingVerbosity, options.profiling_verbosity)
    for pool in options.memory_pools:
        _member(op, "memory_pools", trt.MemoryPoolType, pool)
    for name in options.compute_capability:
        _capability(op, trt, name)
    if "current" in options.compute_capability and (len(options.compute_capability) > 1 or not gpu):
        raise ExportError(f"{op}: compute_capability: got 'current', allowed: alone, and where there is a GPU")


def _check_ranges(op: str, options: BuildOptions) -> None:
    level, streams = options.optimization_level, options.max_aux_streams
    if level is not None and not 0 <= level <= 5:
        raise ExportError(f"{op}: optimization_level: got {level}, allowed: 0 to 5")
    if streams is not None and streams < 0:
        raise ExportError(f"{op}: max_aux_streams: got {streams}, allowed: 0 (one stream) or more")
    for pool, size in options.memory_pools.items():
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ExportError(f"{op}: memory_pools[{pool!r}]: got {size!r}, allowed: bytes, an int above 0")


def _member(op: str, argument: str, enum: Any, name: str) -> Any:
    known = members(enum)
    if name not in known:
        raise ExportError(f"{op}: {argument}: got {name!r}, allowed: {', '.join(map(repr, known))}")
    return known[name]


def _capability(op: str, trt: Any, name: str) -> Any:
    """ "8.9" or "current" as a trt.ComputeCapability."""
    known = {
        (key if key == "current" else f"{key[2:-1]}.{key[-1]}"): value
        for key, value in members(trt.ComputeCapability).items()
        if key != "none"
    }
    if name not in known:
        raise ExportError(f"{op}: compute_capability: got {name!r}, allowed: {', '.join(map(repr, known))}")
    return known[name]


def configure(op: str, backend: Backend, config: Any, options: BuildOptions) -> None:
    """Set checked options on an IBuilderConfig."""
    trt, flags = backend.module, backend.module.BuilderFlag
    for flag, wanted in (
        (flags.TF32, options.tf32),
        (flags.VERSION_COMPATIBLE, options.version_compatible),
        (flags.REFIT, options.refit),
        (flags.STRIP_PLAN, options.strip_weights),
    ):
        (config.set_flag if wanted else config.clear_flag)(flag)
    config.profiling_verbosity = _member(op, "profiling_verbosity", trt.ProfilingVerbosity, options.profiling_verbosity)
    for pool, size in options.memory_pools.items():
        config.set_memory_pool_limit(_member(op, "memory_pools", trt.MemoryPoolType, pool), size)
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility != "none":
        level = _member(op, "hardware_compatibility", trt.HardwareCompatibilityLevel, options.hardware_compatibility)
        config.hardware_compatibility_level = level
    if options.compute_capability:
        config.num_compute_capabilities = len(options.compute_capability)
        for index, name in enumerate(options.compute_capability):
            if not config.set_compute_capability(_capability(op, trt, name), index):
                raise ExportError(f"{op}: compute_capability: {name!r} was refused by {backend.name}")


def attach_timing_cache(op: str, config: Any, path: PathLike | None) -> Any:
    """Attach the timing cache in the file at path, or a new one, to config and return it; None without a path.

    Raises:
        ExportError: the file is unreadable, or TensorRT refuses it (another TensorRT or GPU wrote it).
    """
    if path is None:
        return None
    data = read_input(op, path, max_bytes=MAX_CACHE_BYTES, argument="timing_cache") if Path(path).exists() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise ExportError(
            f"{op}: timing_cache: got {str(path)!r}, allowed: a cache of this TensorRT on this GPU, or a new file"
        )
    return cache
