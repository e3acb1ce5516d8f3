"""How a function is called: each way is a function from (function, tensors by name, call) to a list of results.

function takes the tensors and answers its results in a list. What a way answers is compared between our function, torch's, and
torch's in fp64, place by place; None stands for a gradient that there is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fused_ops.nn
from fused_ops.testing import Op

from .calls import Call

Function = Callable[[dict[str, Any]], list[Any]]
Results = list[Any]


def _leaves(tensors: dict[str, Any], call: Call) -> tuple[dict[str, Any], list[Tensor]]:
    new = {name: t.detach().requires_grad_() if name in call.needs else t for name, t in tensors.items()}
    return new, [new[name] for name in call.needs]


def _dy(out: Tensor, call: Call) -> Tensor:
    """The gradient that comes in: the same numbers for a function and for its fp64 formula, of out's dtype."""
    return call.dy.build(tuple(out.shape), call.dy_dtype or out.dtype).to(out.dtype)


def no_grad(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    with torch.no_grad():
        return function(tensors)


def inference(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    with torch.inference_mode():
        return function(tensors)


def backward(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """The output and the gradients of what is needed."""
    given, leaves = _leaves(tensors, call)
    (out,) = function(given)
    return [out.detach(), *torch.autograd.grad(out, leaves, _dy(out, call), allow_unused=True)]


def again(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """Two backwards of one graph, the first kept."""
    given, leaves = _leaves(tensors, call)
    (out,) = function(given)
    dy = _dy(out, call)
    first = torch.autograd.grad(out, leaves, dy, allow_unused=True, retain_graph=True)
    return [*first, *torch.autograd.grad(out, leaves, dy * 2, allow_unused=True)]


def penalty(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """The gradients of a loss that uses the output and the gradients of its own sum (create_graph)."""
    given, leaves = _leaves(tensors, call)
    (out,) = function(given)
    first = torch.autograd.grad((out * _dy(out, call)).sum(), leaves, create_graph=True, allow_unused=True)
    loss = (out * out).sum() + sum((g * g).sum() for g in first if g is not None)
    return [*[g if g is None else g.detach() for g in first], *torch.autograd.grad(loss, leaves, allow_unused=True)]


def in_place(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """Inputs that are views changed in place before, and an output that is changed in place after."""
    given, leaves = _leaves(tensors, call)
    views = {name: (t * 1.0)[...].mul_(0.5) if name in call.needs else t for name, t in given.items()}
    (out,) = function(views)
    dy = _dy(out, call)
    with torch.no_grad():
        kept = out.clone()
    out.mul_(2.0)
    try:
        return [kept, *torch.autograd.grad(out, leaves, dy, allow_unused=True)]
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return [kept, *[None] * len(leaves)]  # a right answer: the function keeps its output


def _autocast(dtype: torch.dtype) -> Callable[[Function, dict[str, Any], Call], Results]:
    def way(function: Function, tensors: dict[str, Any], call: Call) -> Results:
        def inside(given: dict[str, Any]) -> list[Any]:
            with torch.autocast("cpu", dtype):
                return function(given)

        return backward(inside, tensors, call) if call.needs and call.spec.trains else no_grad(inside, tensors, call)

    return way


def _over(function: Function, tensors: dict[str, Any], call: Call) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def of(*values: Tensor) -> Any:
        results = function(tensors | dict(zip(call.needs, values)))
        return tuple(results) if len(results) > 1 else results[0]

    return of, tuple(tensors[name] for name in call.needs)


def batched(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """vmap over what is needed, the batch in a dimension of its own, first or last."""
    of, values = _over(function, tensors, call)
    where = [0 if i % 2 == 0 else t.dim() for i, t in enumerate(values)]
    many = [torch.stack([t, t.flip(0) if t.dim() else t, t * 0.5], dim) for t, dim in zip(values, where)]
    result = vmap(of, tuple(where))(*many)
    return list(result) if isinstance(result, tuple) else [result]


def gradient(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """torch.func.grad of the output times dy."""
    of, values = _over(function, tensors, call)
    return list(grad(lambda *v: (of(*v) * _dy(of(*v), call)).sum(), tuple(range(len(values))))(*values))


def tangent(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """torch.func.jvp."""
    of, values = _over(function, tensors, call)
    tangents = tuple(dataclasses.replace(call.dy, values="normal").build(tuple(t.shape), t.dtype) for t in values)
    result, derivative = jvp(of, values, tangents)  # type: ignore[misc]
    return [result, derivative] if isinstance(result, Tensor) else [*result, *derivative]


def compiled(function: Function, tensors: dict[str, Any], call: Call) -> Results:
    """torch.compile(fullgraph=True), with a backward where one is needed."""
    torch._dynamo.reset()
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    return backward(whole, tensors, call) if call.needs and call.spec.trains else no_grad(whole, tensors, call)


class Way(NamedTuple):
    """weight: how often it is drawn. over: whether it is over tensors (Call.needs). watched: whether raw operators run in it
    that can be watched. seconds: whether a call takes that long."""

    run: Callable[[Function, dict[str, Any], Call], Results]
    weight: float
    over: bool = True
    watched: bool = True


WAYS: dict[str, Way] = {
    "no_grad": Way(no_grad, 24, over=False),
    "inference": Way(inference, 6, over=False),
    "module": Way(no_grad, 5, over=False),
    "grad": Way(backward, 28),
    "again": Way(again, 3),
    "penalty": Way(penalty, 8),
    "in_place": Way(in_place, 5),
    "autocast_bfloat16": Way(_autocast(torch.bfloat16), 5),
    "autocast_float16": Way(_autocast(torch.float16), 4),
    "vmap": Way(batched, 4, watched=False),
    "func_grad": Way(gradient, 4, watched=False),
    "jvp": Way(tangent, 4, watched=False),
    "compile": Way(compiled, 1, watched=False),
}
DIFFERENTIATES = frozenset(("grad", "again", "penalty", "in_place", "func_grad"))
"""Ways that are drawn only for ops with gradients."""


def context(way: str) -> AbstractContextManager[Any]:
    """The region in which a call with a wrong argument is made."""
    if way == "inference":
        return torch.inference_mode()
    if way.startswith("autocast"):
        return torch.autocast("cpu", torch.bfloat16)
    return torch.no_grad() if way == "no_grad" else torch.enable_grad()


def module_of(op: Op) -> type[torch.nn.Module] | None:
    """The class of fused_ops.nn whose forward calls the op's public function."""
    classes = [getattr(fused_ops.nn, name) for name in fused_ops.nn.__all__]
    return next((kind for kind in classes if op.public.__name__ in kind.forward.__code__.co_names), None)
