"""A FAKE tensorrt, for the API surfaces that cannot be installed without NVIDIA's own index: 10.16 and 11.4.

It builds nothing and computes nothing: it records what fused-ops calls, so that a test can assert which of a surface's
features are used. Names and presence of members follow the real modules.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

PLAN = b"a fake plan"


def _enum(name: str, *members: str) -> Any:
    return enum.IntEnum(name, {member: value for value, member in enumerate(members)})


class _Parser:
    def __init__(self, network: Any, logger: Any) -> None:
        self.calls = network.calls

    num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        self.calls.append(("parse_from_file", path))
        return True


class _Config:
    def __init__(self, calls: list[Any]) -> None:
        object.__setattr__(self, "calls", calls)

    def __setattr__(self, name: str, value: Any) -> None:
        self.calls.append((name, value))

    def set_flag(self, flag: Any) -> None:
        self.calls.append(("set_flag", flag.name))

    def clear_flag(self, flag: Any) -> None:
        self.calls.append(("clear_flag", flag.name))

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.calls.append(("set_memory_pool_limit", pool.name, size))

    def add_optimization_profile(self, profile: Any) -> int:
        self.calls.append(("add_optimization_profile", profile.shapes))
        return 0

    def create_timing_cache(self, data: bytes) -> Any:
        self.calls.append(("create_timing_cache", data))
        return SimpleNamespace(serialize=lambda: data + b"+timed")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.calls.append(("set_timing_cache", ignore_mismatch))
        return True


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes


def fake(version: str, inputs: tuple[str, ...] = ("x",)) -> Any:
    """A module object with the 10.x or the 11.x surface; `calls` records what was called on it."""
    calls: list[Any] = []
    eleven = int(version.split(".")[0]) >= 11

    class Builder:
        def __init__(self, logger: Any) -> None:
            logger.log(module.ILogger.WARNING, "a fake warning")

        def create_network(self, flags: int) -> Any:
            calls.append(("create_network", flags))
            tensors = [SimpleNamespace(name=name, is_shape_tensor=False) for name in inputs]
            return SimpleNamespace(calls=calls, num_inputs=len(tensors), get_input=tensors.__getitem__)

        def create_builder_config(self) -> Any:
            return _Config(calls)

        def create_optimization_profile(self) -> Any:
            return _Profile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            calls.append(("build_serialized_network",))
            return PLAN

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = _enum(
            "Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"
        )

    flags = ("TF32", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE")
    module = SimpleNamespace(
        __version__=version,
        calls=calls,
        Builder=Builder,
        ILogger=ILogger,
        IBuilderConfig=_Config,  # has no set_compute_capability: only RTX has
        IProgressMonitor=object,
        OnnxParser=_Parser,
        NetworkDefinitionCreationFlag=_enum(
            "Flags", *(("STRONGLY_TYPED",) if eleven else ("EXPLICIT_BATCH", "STRONGLY_TYPED"))
        ),
        BuilderFlag=_enum("BuilderFlag", *flags, *(() if eleven else ("FP16", "BF16", "INT8", "FP8"))),
        MemoryPoolType=_enum("MemoryPoolType", "WORKSPACE", "TACTIC_DRAM"),
        HardwareCompatibilityLevel=_enum("Level", "NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
        ProfilingVerbosity=_enum("Verbosity", "LAYER_NAMES_ONLY", "DETAILED", "NONE"),
    )
    return module
