"""What the norms share: their arguments' checks, the cast under autocast, and rows over several trailing dimensions."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._torch.arguments import FLOATS, refuse, require_device, require_float, require_shape, require_tensor, said
from ..._torch.autograd import autocasts_to_fp32

Shape = tuple[int, ...]
SHAPES = "a list or tuple of ints, or one int: the last dimensions of input"


def dims_of(normalized_shape: Any) -> Any:
    """normalized_shape as a tuple where it is a list, a tuple or one int; else as it came: `checked` refuses it, or it is a
    tracer's proxy."""
    if isinstance(normalized_shape, (list, tuple)):
        return tuple(normalized_shape)
    return (normalized_shape,) if isinstance(normalized_shape, numbers.Integral) else normalized_shape


def tracing() -> bool:
    """Whether torch.jit.trace is running."""
    return torch._C._get_tracing_state() is not None


def fits(x: Tensor, shape: Any, *parameters: Tensor | None) -> bool:
    """What `checked` checks, for tensors on one device and one normalised dimension, and without words."""
    try:
        sizes = x.shape
        if type(shape) is not tuple or len(shape) != 1 or type(shape[0]) is not int:
            return False
        if len(sizes) == 0 or sizes[-1] != shape[0] or x.dtype not in FLOATS:
            return False
        for parameter in parameters:
            if parameter is not None and (parameter.shape != shape or parameter.dtype not in FLOATS):
                return False
        return True
    except RuntimeError:  # a nested tensor has no shape
        return False


def checked(op: str, x: Tensor, normalized_shape: Any, **parameters: Tensor | None) -> Shape:
    """normalized_shape as ints; refuses, in words, what is no norm over the last dimensions of x with these parameters (weight,
    bias), each or None."""
    require_tensor(op, "input", x)
    require_float(op, "input", x)
    shape = _ints(op, normalized_shape)
    last = tuple(x.shape[-len(shape) :])
    if torch.compiler.is_compiling() and len(last) == len(shape) and not all(_is_int(size) for size in normalized_shape):
        for size, length in zip(shape, last):  # entries that are no ints of Python's: values that a compiler does not read
            torch._check(size == length)
        shape = last
    if last != shape:
        got = f"{said(shape)} with input of shape {tuple(x.shape)}"
        refuse(RuntimeError, op, "normalized_shape", got, f"the last dimensions of input, here {last}")
    for name, parameter in parameters.items():
        if parameter is not None:
            require_tensor(op, name, parameter, optional=True)
            require_float(op, name, parameter)
            require_shape(op, name, parameter, shape)
            require_device(op, name, parameter, x.device)
    return shape


def _ints(op: str, normalized_shape: Any) -> Shape:
    """normalized_shape, which `dims_of` has seen, as ints: its entries may be what torch takes for one."""
    if not isinstance(normalized_shape, tuple):
        refuse(TypeError, op, "normalized_shape", said(normalized_shape), SHAPES)
    if len(normalized_shape) == 0:
        refuse(RuntimeError, op, "normalized_shape", "()", "at least one dimension")
    return tuple([size if _is_int(size) else _index(op, size) for size in normalized_shape])


def _is_int(size: Any) -> bool:
    return isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool)


def _index(op: str, size: Any) -> int:
    """An entry of normalized_shape that is another library's int, or a tensor of one."""
    if not isinstance(size, bool) and not (isinstance(size, Tensor) and size.dtype is torch.bool):
        try:
            return operator.index(size)
        except (TypeError, RuntimeError):
            pass
    refuse(TypeError, op, "normalized_shape", f"{said(size)} among its entries", SHAPES)


def number(op: str, eps: Any) -> float:
    """eps as a float: torch takes any real number, and a tensor of no dimensions and without a gradient."""
    if isinstance(eps, float):
        return eps
    tensor = isinstance(eps, Tensor) and eps.dim() == 0 and not (eps.requires_grad or eps.is_complex() or eps.is_meta)
    if not tensor and not isinstance(eps, (numbers.Real, torch.SymFloat, torch.SymInt)):
        gradient = " that requires a gradient" if isinstance(eps, Tensor) and eps.requires_grad else ""
        refuse(TypeError, op, "eps", said(eps) + gradient, "a number: a float, an int, or a tensor of one without a gradient")
    try:
        return float(eps)
    except OverflowError:
        refuse(TypeError, op, "eps", said(eps), "a number that a float can hold")


def cast_all(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """x and its parameters in fp32 where autocast asks for it; what is fp64 stays, as in torch's own norms."""
    if not autocasts_to_fp32(x):
        return x, parameters
    return _fp32(x), tuple([None if parameter is None else _fp32(parameter) for parameter in parameters])


def _fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def over_rows(run: Callable[..., Any], x: Tensor, shape: Shape, *parameters: Tensor | None) -> Any:
    """run(x, *parameters), which normalises over the last dimension, over the dimensions of shape.

    run's result, or the first of its results, has x's shape; statistics that follow have one number for each row.
    """
    if len(shape) == 1:
        return run(x, *parameters)
    result = run(x.flatten(-len(shape)), *[None if parameter is None else parameter.flatten() for parameter in parameters])
    return result.view(x.shape) if isinstance(result, Tensor) else (result[0].view(x.shape), *result[1:])
