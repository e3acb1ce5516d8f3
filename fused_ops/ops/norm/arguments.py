"""What the norms share: their arguments' checks, the cast under autocast, and rows over several trailing dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._torch.arguments import FLOATS, refuse, require_device, require_float, require_shape, require_tensor
from ..._torch.autograd import autocasts_to_fp32

Shape = tuple[int, ...]


def dims_of(normalized_shape: Any) -> Shape:
    """normalized_shape, an int or a sequence, as a tuple; a proxy of one, which a tracer gives, stays what it is."""
    if isinstance(normalized_shape, int):
        return (normalized_shape,)
    return normalized_shape if hasattr(normalized_shape, "__torch_function__") else tuple(normalized_shape)


def fits(x: Tensor, shape: Shape, *parameters: Tensor | None) -> bool:
    """What `check` checks, for tensors on one device and one normalised dimension, and without words."""
    try:
        sizes = x.shape
        if len(shape) != 1 or len(sizes) == 0 or sizes[-1] != shape[0] or x.dtype not in FLOATS:
            return False
        for parameter in parameters:
            if parameter is not None and (parameter.shape != shape or parameter.dtype not in FLOATS):
                return False
        return True
    except RuntimeError:  # a nested tensor has no shape
        return False


def check(op: str, x: Tensor, shape: Shape, **parameters: Tensor | None) -> None:
    """Refuse, in words, what is no norm over the last dimensions of x with these parameters (weight, bias), each or None."""
    require_tensor(op, "input", x)
    require_float(op, "input", x)
    if len(shape) == 0:
        refuse(RuntimeError, op, "normalized_shape", shape, "at least one dimension")
    if x.shape[-len(shape) :] != shape:
        got = f"{shape} with input of shape {tuple(x.shape)}"
        refuse(RuntimeError, op, "normalized_shape", got, f"the last dimensions of input, here {tuple(x.shape[-len(shape) :])}")
    for name, parameter in parameters.items():
        if parameter is not None:
            require_tensor(op, name, parameter, optional=True)
            require_float(op, name, parameter)
            require_shape(op, name, parameter, shape)
            require_device(op, name, parameter, x.device)


def cast_all(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """x and its parameters in fp32 where autocast asks for it; fp64 stays."""
    if not autocasts_to_fp32(x):
        return x, parameters
    x = x.float() if x.dtype is not torch.float64 else x
    return x, tuple([None if parameter is None else parameter.to(x.dtype) for parameter in parameters])


def over_rows(run: Callable[..., Any], x: Tensor, shape: Shape, *parameters: Tensor | None) -> Any:
    """run(x, *parameters), which normalises over the last dimension, over the dimensions of shape.

    run's result, or the first of its results, has x's shape; statistics that follow have one number for each row.
    """
    if len(shape) == 1:
        return run(x, *parameters)
    result = run(x.flatten(-len(shape)), *[None if parameter is None else parameter.flatten() for parameter in parameters])
    return result.view(x.shape) if isinstance(result, Tensor) else (result[0].view(x.shape), *result[1:])
