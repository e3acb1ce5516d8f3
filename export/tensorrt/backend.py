"""Load the installed TensorRT: `tensorrt` (10 and 11, for servers) or `tensorrt_rtx`. Features are probed, not versions."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from ..files.atomic import ExportError

EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}  # import name: extra of fused-ops that installs it
MESSAGES = 20  # of the builder's messages shown in an exception


class EngineError(ExportError):
    """A TensorRT build or load that failed. `messages` holds every warning and error that TensorRT logged."""

    def __init__(self, text: str, messages: list[str]) -> None:
        super().__init__("\n  ".join([text, *messages[-MESSAGES:]]))
        self.messages = messages


@dataclass(frozen=True)
class Backend:
    """One installed TensorRT: its import name and module."""

    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def compiles_at_runtime(self) -> bool:
        """True for TensorRT-RTX: its builder needs no GPU and times nothing; kernels are compiled where the engine runs."""
        return hasattr(self.module.IBuilderConfig, "set_compute_capability")

    def logger(self, verbose: bool = False) -> Any:
        """A new trt.ILogger that keeps warnings and errors in `.messages`: TensorRT returns None on failure and never raises.

        verbose: keep every message.
        """
        return _native_logger(self.module, int(self.module.ILogger.VERBOSE if verbose else self.module.ILogger.WARNING))


def _native_logger(trt: Any, threshold: int) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            line = f"{severity.name.lower()}: {' '.join(message.split())}"
            if int(severity) <= threshold and line not in self.messages:
                self.messages.append(line)

    return Logger()


def load_backend(op: str, name: str = "auto") -> Backend:
    """Import the TensorRT to use.

    Args:
        op: the caller's name, for messages.
        name: "tensorrt", "tensorrt_rtx", or "auto": the first one installed, `tensorrt` first where there is a GPU (it
            cannot build without one), `tensorrt_rtx` first elsewhere.

    Raises:
        ExportError: the name is unknown, or the package is installed but does not load.
        ModuleNotFoundError: it is not installed; the message says which extra of fused-ops installs it.
    """
    if name != "auto" and name not in EXTRAS:
        raise ExportError(f"{op}: backend: got {name!r}, allowed: 'auto', {', '.join(map(repr, EXTRAS))}")
    order = sorted(EXTRAS, reverse=not has_gpu()) if name == "auto" else [name]
    for candidate in order:
        if importlib.util.find_spec(candidate) is not None:  # an absolute name: never fused_ops.export.tensorrt
            return Backend(candidate, _import(op, candidate))
    extras = " or ".join(f"pip install 'fused-ops[{EXTRAS[candidate]}]'" for candidate in order)
    raise ModuleNotFoundError(f"{op}: {' and '.join(order)}: not installed; it comes with: {extras}", name=order[0])


def has_gpu() -> bool:
    return torch.cuda.is_available()


def gpu_properties() -> dict[str, str] | None:
    """Name and compute capability of the current GPU, to which an engine built here is bound; None without a GPU."""
    if not has_gpu():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


def _import(op: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # the bindings are there, a library they load is not
        raise ExportError(f"{op}: {name} is installed but does not load: {error}") from error


def network_flags(trt: Any) -> int:
    """The flags that create a strongly typed, explicit-batch network. TensorRT 11 and RTX lack a flag that became default."""
    flags = trt.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(flags, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name))


def parser_errors(parser: Any) -> list[str]:
    """The ONNX parser's errors, a line for each: the node, its operator, the reason, and the place in the parser's source."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
        lines.append(f"{node}{' '.join(error.desc().split())} [{error.file()}:{error.line()}, {error.code()}]")
    return lines
