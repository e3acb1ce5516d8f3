"""What the public functions of the linear family check before anything is launched, and their cast under autocast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch.arguments import FLOATS, refuse, require_device, require_float, require_shape, require_tensor
from .activations import check_activation


def fits_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """What check_linear checks, in one expression, for tensors on one device, a weight (N, K) and a bias (N,)."""
    if weight is None:
        return False
    sizes, shape, dtype = x.shape, weight.shape, x.dtype
    return (
        len(shape) == 2
        and len(sizes) > 0
        and sizes[-1] == shape[1]
        and dtype in FLOATS
        and weight.dtype is dtype
        and (bias is None or (bias.dtype is dtype and bias.shape == (shape[0],)))
    )


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, autocast: bool) -> None:
    op = "fused_linear"
    require_tensor(op, "input", input)
    require_tensor(op, "weight", weight)
    require_float(op, "input", input)
    check_activation(op, activation)
    if weight.dim() not in (1, 2):
        refuse(RuntimeError, op, "weight", f"shape {tuple(weight.shape)}", "shape (N, K) or (K,)")
    if input.dim() == 0:
        refuse(RuntimeError, op, "input", "a 0-d tensor", f"shape (*, {weight.shape[-1]})")
    if input.shape[-1] != weight.shape[-1]:
        got = f"shape {tuple(input.shape)}, whose last dimension is {input.shape[-1]}"
        refuse(RuntimeError, op, "input", got, f"last dimension K = {weight.shape[-1]} of weight {tuple(weight.shape)}")
    _require_like(op, "input", input, (("weight", weight, None), ("bias", bias, None)), autocast)
    N = weight.shape[0] if weight.dim() == 2 else 1
    if bias is not None and tuple(bias.shape) not in ((N,), (1,), ()):
        refuse(RuntimeError, op, "bias", f"shape {tuple(bias.shape)}", f"shape ({N},)")


def check_gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    autocast: bool,
) -> None:
    op = "fused_gated_linear"
    require_tensor(op, "input", input)
    require_float(op, "input", input)
    check_activation(op, activation)
    require_tensor(op, "gate_weight", gate_weight)
    if gate_weight.dim() != 2:
        refuse(RuntimeError, op, "gate_weight", f"shape {tuple(gate_weight.shape)}", "shape (N, K)")
    if input.dim() == 0 or input.shape[-1] != gate_weight.shape[1]:
        refuse(
            RuntimeError,
            op,
            "input",
            f"shape {tuple(input.shape)}",
            f"last dimension K = {gate_weight.shape[1]} of gate_weight",
        )
    shape, row = gate_weight.shape, gate_weight.shape[:1]
    others = (
        ("gate_weight", gate_weight, shape),
        ("up_weight", up_weight, shape),
        ("gate_bias", gate_bias, row),
        ("up_bias", up_bias, row),
    )
    _require_like(op, "input", input, others, autocast)


def check_mlp(
    input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str, autocast: bool
) -> None:
    op = "fused_mlp"
    require_tensor(op, "input", input)
    require_float(op, "input", input)
    check_activation(op, activation)
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        require_tensor(op, name, weight)
        if weight.dim() != 2:
            refuse(RuntimeError, op, name, f"shape {tuple(weight.shape)}", "two dimensions")
    (H, K), N = weight1.shape, weight2.shape[0]
    if input.dim() == 0 or input.shape[-1] != K:
        refuse(
            RuntimeError,
            op,
            "input",
            f"shape {tuple(input.shape)}",
            f"last dimension K = {K} of weight1 {tuple(weight1.shape)}",
        )
    others = (("weight1", weight1, (H, K)), ("weight2", weight2, (N, H)), ("bias1", bias1, (H,)), ("bias2", bias2, (N,)))
    _require_like(op, "input", input, others, autocast)


def _require_like(
    op: str, first: str, x: Tensor, others: Iterable[tuple[str, Tensor | None, Sequence[int] | None]], autocast: bool
) -> None:
    """Check each of others, (name, tensor, its shape or None for any), against the input x.

    Each is a float tensor on x's device and, unless autocast is going to cast it, of x's dtype. A bias may be None.
    """
    for name, tensor, shape in others:
        require_tensor(op, name, tensor, optional="bias" in name)
        if tensor is not None:
            require_float(op, name, tensor)
            if shape is not None:
                require_shape(op, name, tensor, shape)
            require_device(op, name, tensor, x.device)
            if tensor.dtype is not x.dtype and not autocast:
                refuse(RuntimeError, op, name, tensor.dtype, f"the dtype of {first}, {x.dtype}")


def cast_all(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Everything in the autocast dtype, as torch's linear under autocast; None stays None, float64 as it is."""
    if x.dtype is torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return (x.to(dtype), *(t if t is None else t.to(dtype) for t in others))
