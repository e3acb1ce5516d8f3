"""From torch tensors to a kernel launch: the current device and stream, and nothing else on the path."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import compiled
from .compiled import Planned

_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda i: torch.cuda.current_stream(i).cuda_stream)
_traced_type: type[Tensor] | None = None  # of the tensors that a compiler traces launches with
_traced_launch: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]

_recorder: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], bool] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Any, int, dict[str, Any]]]]:
    """While active, this thread's launches are noted as (kernel, grid, keyword arguments) and not made."""
    global _recorder
    launches: list[tuple[Any, int, dict[str, Any]]] = []
    thread = threading.get_ident()

    def record(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if threading.get_ident() != thread:
            return False
        launches.append((kernel, grid, kwargs))
        return True

    before, _recorder = _recorder, record
    try:
        yield launches
    finally:
        _recorder = before


def when_traced(tensor_type: type[Tensor], traced_launch: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]) -> None:
    """Hand launches on tensors of exactly this type, which have no memory, to traced_launch(kernel, grid, args, kwargs)."""
    global _traced_type, _traced_launch
    _traced_type, _traced_launch = tensor_type, traced_launch


def launch(kernel: Any, grid: int, anchor: Tensor, *args: Any, **kwargs: Any) -> None:
    """kernel[(grid,)](*args, **kwargs) on the device of anchor, whichever device is current. A grid of 0 is no launch.

    args: tensors of that device and ints. kwargs: ints, floats, constexprs and options such as num_warps.
    """
    if grid == 0 or (_recorder is not None and _recorder(kernel, grid, args, kwargs)):
        return
    if type(anchor) is _traced_type:
        _traced_launch(kernel, grid, args, kwargs)
        return
    device = anchor.get_device()
    if device < 0:  # the interpreter
        kernel[(grid,)](*args, **kwargs)
    elif device == _current_device():
        compiled.run(kernel, grid, device, _current_stream(device), args, kwargs)
    else:
        with torch.cuda.device(device):
            compiled.run(kernel, grid, device, _current_stream(device), args, kwargs)


def launch_planned(planned: Planned, *tensors: Tensor) -> None:
    """Launch a plan on tensors of its device and dtypes."""
    device = planned.device
    traced = type(tensors[0]) is _traced_type
    if planned.runs_directly and not traced and _recorder is None and device == _current_device():
        planned.run(_current_stream(device), tensors)  # nearly every call
        return
    try:
        launch(planned.kernel, planned.grid, tensors[0], *tensors, *planned.sizes, **planned.options)
    except Exception as error:  # the compiler's and the driver's have many types
        if planned.instead is None or device < 0 or traced:
            raise
        from .clusters import give_up

        give_up(device, error)
        launch_planned(planned.instead(), *tensors)
