"""What the autograd Functions of all families share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import flops, sharding
from .compile import asks_for_aten

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_task: Callable[[], int] = torch._C._current_graph_task_id
_will_execute: Callable[[Any], bool] = torch._C._will_engine_execute_node
_wants_leaves = -1  # a backward that is known to be torch.autograd.grad with respect to leaves


def runs_aten(op: str = "") -> bool:
    """Whether the public function must compute with ATen's functions instead of our operator.

    So it is under torch.func transforms, forward-mode AD and torch.jit.trace, where ATen's functions are right without
    further work and a traced graph holds no operator of ours; and under torch.compile where compile_with_aten asks for it
    for this op.
    """
    sharding.register_when_used()
    flops.register_when_used()
    return (
        transformed()
        or torch._C._get_tracing_state() is not None
        or (torch.compiler.is_compiling() and asks_for_aten(op) and not _exporting())
    )


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active: then ATen's functions may be differentiated further."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _exporting() -> bool:
    """Whether torch.export is running. torch.compiler.is_exporting() of torch 2.11 is true for any compilation; its flag is
    right."""
    return torch.compiler._is_exporting_flag


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded and one of the tensors needs one: then an op goes through its autograd Function."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needed_gradients(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad, less the gradients that the backward that is running does not ask for.

    A graph that is kept may be taken in parts: torch.autograd.grad(y, x, retain_graph=True) now, the weights' gradients later.
    Nothing is then computed twice. The engine is asked at the first backward of a kept graph, and again only where that one
    asked for a part; a graph that is not kept, as in ordinary training, costs one look.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if needs.count(True) < 2 or torch.compiler.is_compiling():
        return needs
    in_parts = getattr(ctx, "in_parts", None)
    if in_parts is False or (in_parts is None and not _keeps_graph()):
        return needs
    nodes = [node for node, _ in ctx.next_functions if node is not None]  # of the tensors that need a gradient, in their order
    asked = [_asks_for(nodes.pop(), first=not nodes) for _ in range(len(nodes))]  # the input last: see there
    found = tuple([need and asked.pop() for need in needs])
    ctx.in_parts = found != needs
    return found


def _asks_for(node: Any, first: bool) -> bool:
    """Whether the running backward asks for the gradient of a tensor with this node.

    Of a leaf that torch.autograd.grad asks for, the engine does not say so: it raises, which takes 0.1 ms. So once it has, the
    other leaves of that backward count as asked for, but for an op's first tensor: its input, whose gradient is often asked
    for alone.
    """
    global _wants_leaves
    if not first and _wants_leaves == _task() and type(node).__name__ == "AccumulateGrad":
        return True
    try:
        return _will_execute(node)
    except RuntimeError:
        _wants_leaves = _task()
        return True


def autocasting(input: Tensor) -> bool:
    """Whether autocast is on for input's device. (torch raises when asked about the meta device, which has no autocast.)"""
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def autocast_off(input: Tensor) -> AbstractContextManager[Any]:
    """A region in which autocast is off for input's device; torch.compile reads it."""
    return contextlib.nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False)


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
    with torch.enable_grad(), autocast_off(grad):
        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        grads = iter(torch.autograd.grad(function(*args), wanted, grad, create_graph=True))
    return [next(grads) if isinstance(a, Tensor) and a.requires_grad else None for a in args]
