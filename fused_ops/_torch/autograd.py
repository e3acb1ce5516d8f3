"""What the autograd Functions of all families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import flops, sharding
from .compile import COMPILE_WITH_ATEN


def runs_aten(op: str = "") -> bool:
    """Whether the call must be plain ATen: under torch.func transforms, forward-mode AD, or torch.jit.trace; or under
    torch.compile when compile_with_aten says so for this op.

    ATen's own functions are then right for free, and a traced graph has no operator of ours in it.
    """
    sharding.register_when_used()
    flops.register_when_used()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (torch.compiler.is_compiling() and COMPILE_WITH_ATEN.get(op, False) and not _exporting())
    )


def _exporting() -> bool:
    """torch.compiler.is_exporting(), which torch 2.11 takes for true whenever it compiles; the flag behind it is right."""
    return torch.compiler._is_exporting_flag


def autocasting(input: Tensor) -> bool:
    """Whether autocast is on for input's device; torch knows no autocast for the meta device and raises when asked."""
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def autocasts_to_fp32(input: Tensor) -> bool:
    """Whether autocast is on for input's device and casts norms and softmax to fp32, which torch's CPU autocast does not."""
    return not input.is_cpu and autocasting(input)


def gradient_of_saved(grad: Tensor | None) -> Tensor | None:
    """The gradient of an output that users never see (a pre-activation): not None only in a gradient of a gradient.

    Dynamo hands zeros for it, which would make of every compiled backward the differentiable one.
    """
    return None if torch.compiler.is_dynamo_compiling() else grad


def take_saved(ctx: Any) -> tuple[Any, ...]:
    """ctx.saved_tensors, which the graph then no longer holds, unless it is kept for another backward (retain_graph): what
    the caller drops is free at once, not at the end of its backward."""
    saved = ctx.saved_tensors
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()
    return saved


def differentiable_backward(function: Callable[..., Tensor], args: tuple[Any, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradients of function(*args) as differentiable functions themselves: the path of create_graph=True.

    Returns one entry an argument, None where the argument is no tensor or needs no gradient.
    """
    device_type = grad.device.type
    with torch.enable_grad(), torch.autocast(device_type, enabled=False):
        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        grads = iter(torch.autograd.grad(function(*args), wanted, grad, create_graph=True))
    return [next(grads) if isinstance(a, Tensor) and a.requires_grad else None for a in args]
