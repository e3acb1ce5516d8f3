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
    """Whether the public function must compute with ATen's functions instead of our operator.

    So it is under torch.func transforms, forward-mode AD and torch.jit.trace, where ATen's functions are right without
    further work and a traced graph holds no operator of ours; and under torch.compile where compile_with_aten asks for it
    for this op.
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
    """Whether torch.export is running. torch.compiler.is_exporting() of torch 2.11 is true for any compilation; its flag is
    right."""
    return torch.compiler._is_exporting_flag


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded and one of the tensors needs one: then an op goes through its autograd Function."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocasting(input: Tensor) -> bool:
    """Whether autocast is on for input's device. (torch raises when asked about the meta device, which has no autocast.)"""
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def autocasts_to_fp32(input: Tensor) -> bool:
    """Whether autocast casts norms and softmax to fp32 here: it does on a GPU and not on the CPU."""
    return not input.is_cpu and autocasting(input)


def gradient_of_saved(grad: Tensor | None) -> Tensor | None:
    """The gradient of a saved output: a second output, such as the pre-activation, that users never see.

    It is None in every first backward. It is a tensor when a backward is itself differentiated: then the gradient flows
    through the saved output too. Dynamo passes zeros instead of None; they are dropped, or every compiled backward would
    take the slower, differentiable path.
    """
    return None if torch.compiler.is_dynamo_compiling() else grad


def take_saved(ctx: Any) -> tuple[Any, ...]:
    """ctx.saved_tensors, removed from the graph unless it is kept for another backward (retain_graph).

    A saved tensor is then freed as soon as the backward drops it, not when the backward ends.
    """
    saved = ctx.saved_tensors
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()
    return saved


def differentiable_backward(function: Callable[..., Tensor], args: tuple[Any, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradients of function(*args), themselves differentiable: what a backward does under create_graph=True.

    Returns one entry for each argument: None where it is no tensor or needs no gradient.
    """
    device_type = grad.device.type
    with torch.enable_grad(), torch.autocast(device_type, enabled=False):
        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        grads = iter(torch.autograd.grad(function(*args), wanted, grad, create_graph=True))
    return [next(grads) if isinstance(a, Tensor) and a.requires_grad else None for a in args]
