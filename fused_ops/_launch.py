"""From torch tensors to a kernel launch: the device's facts, the current device, and nothing else on the path."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import _compiled
from ._compile import traced_launch
from ._compiled import Planned
from ._spec import INTERPRET

INTERPRETER_CAPABILITY = (9, 0)  # what a configuration is chosen for when kernels are interpreted
INTERPRETER_SMS = 4

_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda i: torch.cuda.current_stream(i).cuda_stream)

_plans: list[Any] = []

KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


@functools.cache
def _cuda_facts(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


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


def facts_of(device: int) -> tuple[tuple[int, int], int]:
    """(capability, SM count) of a GPU by index; the interpreter's stand-ins for -1, the CPU."""
    return _cuda_facts(device) if device >= 0 else (INTERPRETER_CAPABILITY, INTERPRETER_SMS)


def device_facts(tensor: Tensor) -> tuple[tuple[int, int], int]:
    """(capability, SM count) of the tensor's GPU; the interpreter's stand-ins for a CPU tensor."""
    return facts_of(tensor.get_device())


def launch(kernel: Any, grid: int, anchor: Tensor, *args: Any, **kwargs: Any) -> None:
    """kernel[(grid,)](*args, **kwargs) on the device of anchor, whichever device is current. A grid of 0 is no launch.

    args: tensors of that device and ints. kwargs: ints, floats, constexprs and options such as num_warps.
    """
    if grid == 0 or (_recorder is not None and _recorder(kernel, grid, args, kwargs)):
        return
    if type(anchor) is FunctionalTensor:  # AOTAutograd is tracing
        traced_launch(kernel, grid, args, kwargs)
        return
    device = anchor.get_device()
    if device < 0:  # the interpreter
        kernel[(grid,)](*args, **kwargs)
    elif device == _current_device():
        _compiled.run(kernel, grid, device, _current_stream(device), args, kwargs)
    else:
        with torch.cuda.device(device):
            _compiled.run(kernel, grid, device, _current_stream(device), args, kwargs)


def launch_planned(planned: Planned, *tensors: Tensor) -> None:
    """launch of what a plan answered, on tensors of the plan's device and dtypes."""
    device = planned.device
    traced = type(tensors[0]) is FunctionalTensor
    if planned.runs_directly and not traced and _recorder is None and device == _current_device():
        planned.run(_current_stream(device), tensors)  # nearly every call
        return
    try:
        launch(planned.kernel, planned.grid, tensors[0], *tensors, *planned.sizes, **planned.options)
    except Exception as error:  # the compiler's and the driver's have many types
        if planned.instead is None or device < 0 or traced:
            raise
        from ._cluster import give_up

        give_up(device, error)
        launch_planned(planned.instead(), *tensors)


def rows_of(x: Tensor) -> Tensor:
    """x as (M, N) with N its last dimension: a view where the leading dimensions collapse, else one copy."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)


def plan(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, of sizes, strides, dtypes and the device, with what it answered kept: choosing a launch takes longer than
    launching. It answers a Planned, whose arguments but for addresses they settle, every tensor's dtype too.

    Symbolic sizes cannot be kept and are worked out each time. A cluster that is refused is planned again, without.
    """

    def make(*args: Any) -> Any:
        planned = function(*args)
        if planned.options.get("num_ctas", 1) > 1:
            planned.runs_directly, planned.instead = False, functools.partial(call, *args)
        return planned

    kept = functools.lru_cache(4096)(make)
    _plans.append(kept)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return kept(*args)
        except TypeError:
            return make(*args)

    return call


def forget_plans() -> None:
    """Let every plan be made again: after a change of configurations."""
    for kept in _plans:
        kept.cache_clear()


def rows_and_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x as rows, M, row stride, column stride) for the last dimension, without a view where x is contiguous."""
    if x.is_contiguous():
        N = x.shape[-1]
        return x, x.numel() // N, N, 1
    rows = rows_of(x)
    return rows, rows.shape[0], rows.stride(0), rows.stride(1)


def empty_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of x's shape, nothing written to it."""
    if x.dtype is dtype and x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)  # one element may have any stride
    return x.new_empty(x.shape, dtype=dtype)


@functools.cache
def _reduce() -> Any:
    from .kernels import reduce

    return reduce


def column_sum(part: Tensor, dtype: torch.dtype) -> Tensor:
    """part (P, N) fp32 summed over P, in dtype: the second stage of a deterministic reduction."""
    return column_sums(part.unsqueeze(0), dtype, dtype)[0]


def column_sums(parts: Tensor, first: torch.dtype, second: torch.dtype) -> list[Tensor]:
    """parts (1 or 2, P, N) fp32, contiguous but for a larger row stride, summed over P in one launch: (N,) in first, and
    in second."""
    reduce = _reduce()
    S, P, N = parts.shape
    out = [torch.empty((N,), dtype=dtype, device=parts.device) for dtype in (first, second)[:S]]
    blocks = {"BLOCK_P": reduce.COLUMN_SUM_BLOCK_P, "BLOCK_N": reduce.COLUMN_SUM_BLOCK_N}
    grid = S * -(-N // blocks["BLOCK_N"])
    launch(reduce.column_sum_kernel, grid, parts, parts, out[0], out[-1], P, N, stride_pp=parts.stride(1), **blocks)
    return out


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return INTERPRET
