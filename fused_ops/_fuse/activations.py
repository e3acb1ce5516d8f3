"""Which activation a module, a function or a method applies, in fused_linear's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hf
from .conditions import as_its_class_says


def _gelu(approximate: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


# class -> the name of the activation that one instance applies, or None. Exact classes only.
MODULES: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.SiLU: lambda m: "silu",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.Tanh: lambda m: "tanh",
}
_TORCHS = {cls: (name_of, cls.forward) for cls, name_of in MODULES.items()}  # a library may replace a forward later
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid",
    F.tanh: "tanh", torch.tanh: "tanh", torch.tanh_: "tanh",
}  # fmt: skip
METHODS = {name: name.rstrip("_") for name in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")}
_TENSORS = {name: getattr(Tensor, name) for name in METHODS}


def activation_of(activation: Any, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> str | None:
    """The name of what `activation(x, *args, **options)` applies, or None where fused_linear does not know it.

    activation: a module, a function, or the name of a tensor's method. A module that has hooks or a forward of its own is
    not known. Looked at in each call of a fused forward, and by a compiler.
    """
    if isinstance(activation, nn.Module):
        if args or options or not as_its_class_says(activation):
            return None
        entry = _TORCHS.get(type(activation)) or hf.activations().get(type(activation))
        if entry is None or type(activation).forward is not entry[1]:
            return None
        return entry[0](activation)
    if isinstance(activation, str):
        name = None if args or options else METHODS.get(activation)
        return name if name is not None and getattr(Tensor, activation) is _TENSORS[activation] else None
    if not callable(activation):
        return None
    return _function(activation, args, options or {})


def _function(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    try:
        name = FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None
    if name == "gelu":
        return _gelu(options.get("approximate", "none")) if not args and len(options) <= ("approximate" in options) else None
    takes_inplace = function is F.relu or function is F.silu
    known = len(args) <= takes_inplace and (not options or (takes_inplace and tuple(options) == ("inplace",)))
    return name if known else None


def looks_like_activation(called: Any) -> bool:
    """Whether a module, a function or a method's name is an activation, known to fused_linear or not."""
    if isinstance(called, nn.Module):
        cls = type(called)
        return cls in MODULES or (cls.__module__ in ("torch.nn.modules.activation", "transformers.activations") and not any(
            isinstance(called, other) for other in (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention)
        ))  # fmt: skip
    if isinstance(called, str):
        return called in METHODS
    return getattr(called, "__name__", "").rstrip("_") in ACTIVATION_FUNCTIONS


ACTIVATION_FUNCTIONS = frozenset(
    ("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu", "prelu", "rrelu", "glu", "mish",
     "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "tanhshrink", "hardshrink", "softshrink")
)  # fmt: skip
