"""What the calls of a fused forward are: each decides anew whether the fused function stands for the modules it was given.

`linear_act(self.act, self.fc1, x)` stands where `self.act(self.fc1(x))` stood. It is given what that expression read, in the
same order, and computes that expression as written whenever the modules are not what a fused function replaces: replaced,
hooked, quantised, wrapped, or of another class. So a module that is called by anyone else stays what it is.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .._torch.arguments import CLASSES, FLOATS, ordinary
from .._torch.spec import REGISTRY
from ..nn import FusedLinear
from ..ops.linear.gated_linear import fused_gated_linear
from ..ops.linear.linear import fused_linear
from ..ops.linear.mlp import fused_mlp
from . import activations, hf
from .activations import activation_of
from .conditions import as_its_class_says, repeats_class_forward, takes

Step = tuple[Any, tuple[Any, ...], dict[str, Any]]  # (a function, a module or a method's name, further arguments, options)

_LINEAR_FORWARD = nn.Linear.forward  # as torch has it: a library may replace it later
_SOFTMAX_FORWARD = nn.Softmax.forward
_LINEARS: dict[type[nn.Module], Any] = {nn.Linear: _LINEAR_FORWARD}  # `learn` adds transformers' Conv1D


def learn() -> None:
    """Take up the classes of libraries that have been loaded since. Called when a model is fused, and when one is unpickled."""
    activations.learn()
    if (conv1d := hf.conv1d()) is not None:
        _LINEARS.setdefault(conv1d, conv1d.forward)


def apply(step: Step, x: Any) -> Any:
    """What the step makes of x, as written in the source: a call, or a method of x."""
    called, args, options = step
    return getattr(x, called)(*args, **options) if isinstance(called, str) else called(x, *args, **options)


def is_linear(linear: Any) -> bool:
    """Whether linear is nothing but x @ weight^T + bias, in the forward of its class. Its weight may be of any kind."""
    cls = type(linear)
    if cls in _LINEARS:
        return cls.forward is _LINEARS[cls]
    if cls is FusedLinear:
        return linear.activation is None
    return isinstance(linear, nn.Linear) and cls.forward is _LINEAR_FORWARD and cls.__call__ is nn.Module.__call__


def operands_of(linear: Any, x: Any) -> tuple[Tensor, Tensor | None] | None:
    """(weight as (out, in), bias) if a fused function may stand in the place of linear(x); else None.

    A tensor of another tool's class, as x or as weight, sees the functions that it would see. Parameters are read past
    Module.__getattr__; one that a property of the class computes is not read, as that may have effects (spectral norm's)
    and is to run once. In every fused call, so all in one function.
    """
    if not ((type(x) in CLASSES or (isinstance(x, Tensor) and ordinary(x))) and x.dtype in FLOATS and is_linear(linear)):
        return None
    state = linear.__dict__
    if (
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
        or _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
        or ("forward" in state and not repeats_class_forward(linear))
    ):  # fmt: skip
        return None
    cls = type(linear)
    if cls not in _LINEARS and (hasattr(cls, "weight") or hasattr(cls, "bias")):  # a property, say
        return None
    own = state["_parameters"]
    weight = own["weight"] if "weight" in own else state.get("weight")
    if type(weight) not in CLASSES and not (isinstance(weight, Tensor) and ordinary(weight)):
        return None
    if not isinstance(linear, nn.Linear):
        weight = weight.t()
    if "bias" not in own and "bias" not in state:
        return None
    bias = own["bias"] if "bias" in own else state["bias"]
    if bias is not None and not (isinstance(bias, Tensor) and bias.shape == weight.shape[:1]):  # one that is broadcast
        return None
    return weight, bias


def linear_act(activation: Any, linear: Any, x: Any, args: tuple[Any, ...] = (), options: dict[str, Any] = {}) -> Any:  # noqa: B006
    """activation(linear(x), *args, **options)."""
    name = activation_of(activation, args, options)
    operands = None if name is None else operands_of(linear, x)
    if operands is None:
        return apply((activation, args, options), linear(x))
    return fused_linear(x, *operands, name)


def gated(
    activation: Any, gate: Any, x: Any, up: Any, other: Any, args: tuple[Any, ...], options: dict[str, Any], up_after: int,
    up_left: bool, product: Any,
) -> Any:  # fmt: skip
    """product(activation(gate(x), *args, **options), up(other)), which is gated if other is x.

    up_after: after how many of the gate's two calls up is called. up_left: whether it is the product's left factor. product: how
    the source multiplies.
    """
    name = activation_of(activation, args, options) if other is x and product in _PRODUCTS else None
    if name is not None:
        left, right = operands_of(gate, x), operands_of(up, x)
        if left is not None and right is not None and left[0].shape == right[0].shape:
            return fused_gated_linear(x, left[0], right[0], name, left[1], right[1])
    second = up(other) if up_after == 0 else None
    hidden = gate(x)
    if up_after == 1:
        second = up(other)
    first = apply((activation, args, options), hidden)
    if up_after == 2:
        second = up(other)
    return product(second, first) if up_left else product(first, second)


def mul(a: Any, b: Any) -> Any:
    """a.mul(b)."""
    return a.mul(b)


def multiply(a: Any, b: Any) -> Any:
    """a.multiply(b)."""
    return a.multiply(b)


_PRODUCTS = (operator.mul, operator.imul, mul, multiply, torch.mul, torch.multiply)


def mlp(second: Any, between: tuple[Step, ...], activation: Step, first: Any, x: Any, fused_first: bool) -> Any:
    """second(...between(activation(first(x)))).

    One op in training where nothing happens between. In evaluation a fused MLP has nothing to save over its first half, and
    cuBLAS does the second: fused_first says whether that half is fused by itself.
    """
    if torch.is_grad_enabled() and getattr(second, "training", False) and all(map(is_idle, between)):
        name = activation_of(*activation)
        one = None if name is None else operands_of(first, x)
        two = None if one is None else operands_of(second, x)
        if one is not None and two is not None:
            return fused_mlp(x, *one, *two, name)
    if fused_first:
        hidden = linear_act(activation[0], first, x, activation[1], activation[2])
    else:
        hidden = apply(activation, first(x))
    for step in between:
        hidden = apply(step, hidden)
    return second(hidden)


def is_idle(step: Step) -> bool:
    """Whether a step returns its input now: an Identity, or a dropout in evaluation or of probability 0."""
    called, args, options = step
    if isinstance(called, nn.Module):
        if args or options or not as_its_class_says(called):
            return False
        return type(called) is nn.Identity or (type(called) is nn.Dropout and (not called.training or called.p == 0))
    if called is not F.dropout or len(args) > 2:
        return False
    p = args[0] if args else options.get("p", 0.5)
    training = args[1] if len(args) > 1 else options.get("training", True)
    return isinstance(p, (int, float)) and (p == 0 or (training is False and 0 <= p <= 1))


def function(called: Any, *args: Any, **options: Any) -> Any:
    """called(*args, **options), by the fused function where called is one that fused_ops has an op for.

    called may be an nn.Softmax made on the spot.
    """
    if isinstance(called, nn.Module):
        known = type(called) is nn.Softmax and nn.Softmax.forward is _SOFTMAX_FORWARD and len(args) == 1 and not options
        quiet = as_its_class_says(called) and not (_global_forward_hooks or _global_forward_pre_hooks)
        quiet = quiet and not (_global_backward_hooks or _global_backward_pre_hooks)
        return _softmax(F.softmax, args[0], called.dim) if known and quiet and takes(args[0]) else called(*args, **options)
    fused = fused_function(called)
    if fused is None or not args or not takes(args[0]):
        return called(*args, **options)
    return fused(called, *args, **options)


def softmax_method(x: Any, *args: Any, **options: Any) -> Any:
    """x.softmax(*args, **options)."""
    return _softmax(_softmax_of, x, *args, **options) if takes(x) else x.softmax(*args, **options)


def _softmax_of(x: Tensor, *args: Any, **options: Any) -> Any:
    return x.softmax(*args, **options)


def _softmax(called: Any, x: Tensor, dim: Any = None, *args: Any, **options: Any) -> Any:
    dtype = options.get("dtype", args[0] if args and called is not F.softmax else None)
    known = len(args) <= (called is not F.softmax) and set(options) <= {"dtype"} and not (args and options)
    if not known or type(dim) is not int or not (dtype is None or dtype in FLOATS):
        return called(x, dim, *args, **options)
    return REGISTRY["softmax"].public(x, dim, dtype=dtype)


def _as_given(public: Callable[..., Any]) -> Callable[..., Any]:
    """The fused function under torch's arguments: what it has no parameter for is torch's own affair."""
    names = frozenset(inspect.signature(public).parameters)

    def call(called: Any, *args: Any, **options: Any) -> Any:
        if len(args) > len(names) or not names.issuperset(options):
            return called(*args, **options)
        return public(*args, **options)

    return call


def fused_function(called: Any) -> Callable[..., Any] | None:
    """What stands for a function of torch or torch.nn.functional, called as (that function, *args), or None."""
    try:
        return _FUNCTIONS.get(called)
    except TypeError:  # not hashable
        return None


def op_of_function(called: Any) -> str | None:
    """The name of the op that stands for a function of torch or torch.nn.functional."""
    names = [op.name for op in REGISTRY.values() if called is not None and called in _spellings(op.torch_fn)]
    return names[0] if names else None


def _spellings(function: Any) -> tuple[Any, ...]:
    """The same function in torch.nn.functional and in torch."""
    name = getattr(function, "__name__", "")
    if getattr(F, name, None) is not function:
        return ()
    return tuple(dict.fromkeys(f for f in (function, getattr(torch, name, None)) if f is not None))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    spelling: _softmax if op.name == "softmax" else _as_given(op.public)
    for op in REGISTRY.values()
    for spelling in _spellings(op.torch_fn)
}
"""{torch's function: the fused one}, of the ops that replace a function of torch.nn.functional."""
FUNCTION_NAMES = frozenset(function.__name__ for function in _FUNCTIONS)


def instead(value: Any, original: Any, fused: Any) -> Any:
    """fused, the rewritten form of original, where the name read in a forward still means original."""
    return fused if value is original else value
