"""What other libraries' Triton kernels cost on the headline rows, by the counter of our own: Liger's, compiled by the same Triton.

Nothing of a peer runs: its calls are made on fake tensors, and what it would launch is noted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from fused_ops._tools.headline import SXM, Row, launches_of
from fused_ops._tools.launches import DEVICE, AtenCall, Gpu, Launch, Pointer, replaced

from .provider import Unsupported, Workload
from .providers.peers import Liger

MODULES = ("liger_kernel.ops.layer_norm", "liger_kernel.ops.rms_norm")  # those that count SMs


def add_path(folder: Path) -> None:
    """Let this process, and those that compile, import what is in a folder. Raises ValueError where Liger is not there."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(f"{folder}: no liger_kernel: pip install --no-deps --target {folder} liger-kernel")


def liger_launches(rows: Sequence[Row], gpu: Gpu = SXM) -> dict[tuple[str, str, str, str], list[Launch | AtenCall]]:
    """What Liger launches on the rows that it has."""
    found = {}
    for row in rows:
        noted: list[Launch | AtenCall] = []
        with contextlib.suppress(Unsupported), _noting(noted, gpu):
            found[row.key] = launches_of(row, gpu, _prepared(row), noted)
    return found


def _prepared(row: Row) -> Callable[[tuple[Any, ...], dict[str, Any]], Callable[..., Any]]:
    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        make = Liger().table().get(row.op.name)
        if make is None:
            raise Unsupported(f"Liger has no {row.op.name}")
        pass_ = "fwd+bwd" if row.pass_ == "bwd" else row.pass_  # nothing is repeated here
        return make(Workload(row.op, row.case, pass_, args, kwargs, "cpu"))

    return prepare


@contextlib.contextmanager
def _noting(noted: list[Launch | AtenCall], gpu: Gpu) -> Iterator[None]:
    """Triton's launches are appended to noted, and torch says that the GPU is there."""
    jit = importlib.import_module("triton.runtime.jit").JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args)) | kwargs
        sizes = grid(values) if callable(grid) else grid
        count = 1
        for size in sizes:
            count *= size
        noted.append(Launch(self.fn.__module__, self.fn.__name__, count, tuple(map(_argument, args)), tuple((k, _argument(v)) for k, v in kwargs.items())))  # fmt: skip

    _ask_for_fake_devices()
    properties = SimpleNamespace(multi_processor_count=gpu.sms, name=gpu.name, major=gpu.capability[0], minor=gpu.capability[1])
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (jit, "run", run), (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "get_device_capability", lambda *_: gpu.capability), (torch.cuda, "is_available", lambda: True),
        ):  # fmt: skip
            stack.enter_context(replaced(owner, name, value))
        yield


def _ask_for_fake_devices() -> None:
    """Liger counts SMs only where a tensor's device is of type "cuda"; fake tensors are of launches.DEVICE: put that in its place."""
    for name in MODULES:
        for function in vars(importlib.import_module(name)).values():
            if isinstance(function, FunctionType) and function.__module__ == name and "cuda" in function.__code__.co_consts:
                constants = tuple(DEVICE if value == "cuda" else value for value in function.__code__.co_consts)
                function.__code__ = function.__code__.replace(co_consts=constants)


def _argument(value: Any) -> Any:
    """A tensor as a pointer, and a dtype of Triton's as text, which kernels/aot.py turns back."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, True, value.numel())
    return (
        f"tl:{value.name}" if type(value).__module__.startswith("triton.") and hasattr(value, "primitive_bitwidth") else value
    )
