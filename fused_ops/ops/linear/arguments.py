"""What the public functions of the linear family check before anything is launched, and their cast under autocast.

An op says once what its weights and biases are, as Operands; `fits` and `check` both read that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch.arguments import FLOATS, refuse, require_device, require_float, require_shape, require_tensor
from .activations import ACTIVATIONS

K, N, H = range(3)  # of input (*, K); the columns of the result; the hidden columns of an MLP


class Operand(NamedTuple):
    """A tensor beside the input: its argument's name, its dimensions, and whether it may be None."""

    name: str
    dims: tuple[int, ...]
    optional: bool = False


def fits(x: Tensor, operands: tuple[Operand, ...], activation: str | None, *tensors: Tensor | None) -> bool:
    """What `check` checks, for tensors on one device, and without words."""
    try:
        dtype = x.dtype
        if dtype not in FLOATS or x.dim() == 0 or not (activation is None or activation in ACTIVATIONS):
            return False
        sizes = [x.shape[-1], -1, -1]
        for operand, tensor in zip(operands, tensors):
            if tensor is None:
                if operand.optional:
                    continue
                return False
            shape = tensor.shape
            if tensor.dtype is not dtype or len(shape) != len(operand.dims):
                return False
            for dim, size in zip(operand.dims, shape):
                if sizes[dim] < 0:
                    sizes[dim] = size
                elif sizes[dim] != size:
                    return False
        return True
    except Exception:  # a nested tensor has no shape, an activation no hash
        return False


def check(op: str, input: Tensor, operands: Sequence[Operand], autocast: bool, *tensors: Tensor | None) -> None:
    """Refuse, in words, what the op cannot multiply. The first operand holds K.

    Each tensor is a float tensor on input's device and of input's dtype, unless autocast is going to cast both: it casts no
    float64.
    """
    require_tensor(op, "input", input)
    require_float(op, "input", input)
    for operand, tensor in zip(operands, tensors):
        require_tensor(op, operand.name, tensor, operand.optional)
    first, weight = operands[0], tensors[0]
    assert weight is not None
    if weight.dim() != len(first.dims):
        refuse(RuntimeError, op, first.name, f"shape {tuple(weight.shape)}", f"shape {_said(first.dims)}")
    sizes = dict(zip(first.dims, weight.shape))
    if input.dim() == 0 or input.shape[-1] != sizes[K]:
        what = f"{first.name} {tuple(weight.shape)}"
        refuse(RuntimeError, op, "input", f"shape {tuple(input.shape)}", f"last dimension K = {sizes[K]} of {what}")
    for operand, tensor in zip(operands, tensors):
        if tensor is not None:
            if len(operand.dims) == 2 and tensor.dim() == 2:
                sizes = dict(zip(operand.dims, tensor.shape)) | sizes
            if all(dim in sizes for dim in operand.dims):
                require_shape(op, operand.name, tensor, [sizes[dim] for dim in operand.dims])
            else:
                refuse(RuntimeError, op, operand.name, f"shape {tuple(tensor.shape)}", f"shape {_said(operand.dims)}")
            require_float(op, operand.name, tensor)
            require_device(op, operand.name, tensor, input.device)
            if tensor.dtype is not input.dtype and not (autocast and torch.float64 not in (tensor.dtype, input.dtype)):
                refuse(RuntimeError, op, operand.name, tensor.dtype, f"the dtype of input, {input.dtype}")


def _said(dims: tuple[int, ...]) -> str:
    return f"({', '.join('KNH'[dim] for dim in dims)}{',' * (len(dims) == 1)})"


def cast_all(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Everything in the autocast dtype, as torch's linear under autocast; None stays None, and where x is float64, so are all."""
    if x.dtype is torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return (x.to(dtype), *(t if t is None else t.to(dtype) for t in others))
