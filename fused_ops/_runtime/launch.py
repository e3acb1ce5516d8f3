"""From torch tensors to a kernel launch: the current device and stream, and nothing else on the path."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .compiled import Planned

_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda i: torch.cuda.current_stream(i).cuda_stream)
_traced_type: type[Tensor] | None = None  # of the tensors that a compiler traces launches with
_traced_launch: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]

_recorder: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], bool] | None = None
_interpreting = threading.RLock()


@contextlib.contextmanager
def recorded(made: bool = False) -> Iterator[list[tuple[Any, int, dict[str, Any]]]]:
    """While active, this thread's launches are noted as (kernel, grid, keyword arguments); they are not made, unless made."""
    global _recorder
    launches: list[tuple[Any, int, dict[str, Any]]] = []
    thread = threading.get_ident()

    def record(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if threading.get_ident() != thread:
            return False
        launches.append((kernel, grid, kwargs))
        return not made

    before, _recorder = _recorder, record
    try:
        yield launches
    finally:
        _recorder = before


def watch_launches(
    watcher: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], bool] | None,
) -> Callable[[Any, int, tuple[Any, ...], dict[str, Any]], bool] | None:
    """From now on ask watcher(kernel, grid, arguments, options) before each launch: True says that it took its place.

    Returns the watcher until now. None ends it.
    """
    global _recorder
    before, _recorder = _recorder, watcher
    return before


def when_traced(tensor_type: type[Tensor], traced_launch: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]) -> None:
    """Hand launches on tensors of exactly this type, which have no memory, to traced_launch(kernel, grid, args, kwargs)."""
    global _traced_type, _traced_launch
    _traced_type, _traced_launch = tensor_type, traced_launch


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler is tracing a launch on tensor, which then has no address."""
    return type(tensor) is _traced_type


def launch(planned: Planned, M: int, *tensors: Tensor) -> None:
    """Launch a plan over M rows, on tensors of its device and dtypes. No row is no launch."""
    grid = -(-M // planned.block) * planned.across if planned.dense else planned.grid(M)
    if 0 < planned.most < grid:
        grid = planned.most
    sizes = (M,) if planned.takes_rows else ()
    direct = planned.runs_directly and grid and _recorder is None and type(tensors[0]) is not _traced_type
    if direct and planned.device == _current_device():
        planned.run(_current_stream(planned.device), grid, sizes, tensors)  # nearly every call
    else:
        _launch_otherwise(planned, grid, sizes, tensors)


def launch_grid(planned: Planned, grid: int, sizes: tuple[int, ...], *tensors: Tensor) -> None:
    """Launch a plan on a grid that does not follow from rows; sizes: the kernel's parameters after the pointers."""
    direct = planned.runs_directly and grid and _recorder is None and type(tensors[0]) is not _traced_type
    if direct and planned.device == _current_device():
        planned.run(_current_stream(planned.device), grid, sizes, tensors)
    else:
        _launch_otherwise(planned, grid, sizes, tensors)


def _launch_otherwise(planned: Planned, grid: int, sizes: tuple[int, ...], tensors: tuple[Tensor, ...]) -> None:
    """A launch that is recorded, traced, interpreted, on another device than the current one, or that may be refused."""
    kernel, options = planned.kernel, planned.options
    if grid == 0 or (_recorder is not None and _recorder(kernel, grid, (*tensors, *sizes), options)):
        return
    if is_traced(tensors[0]):
        _traced_launch(kernel, grid, (*tensors, *sizes), options)
        return
    device = planned.device
    try:
        if device < 0:  # the interpreter, which changes triton.language for as long as a kernel runs
            with _interpreting:
                kernel[(grid,)](*tensors, *sizes, **options)
        elif device == _current_device():
            planned.run(_current_stream(device), grid, sizes, tensors)
        else:
            with torch.cuda.device(device):
                planned.run(_current_stream(device), grid, sizes, tensors)
    except Exception as error:  # the compiler's and the driver's have many types
        if planned.instead is None:
            raise
        rows = sizes[0] if planned.takes_rows else grid // planned.across * planned.block
        launch(planned.instead(error), rows, *tensors)
