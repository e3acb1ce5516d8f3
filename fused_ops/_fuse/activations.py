"""Which activation a module, a function or a method applies, in fused_linear's names."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hf
from .conditions import as_its_class_says


def _gelu(approximate: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


# class -> the name of the activation that it applies, or what tells it of one instance. Exact classes only.
MODULES: dict[type[nn.Module], hf.Name] = {
    nn.ReLU: "relu",
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
# class -> (name, forward as it was: a library may replace it later). `learn` adds those of libraries that are loaded.
_KNOWN: dict[type[nn.Module], hf.Entry] = {cls: (name, cls.forward) for cls, name in MODULES.items()}
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid",
    F.tanh: "tanh", torch.tanh: "tanh", torch.tanh_: "tanh",
}  # fmt: skip
METHODS = {name: name.rstrip("_") for name in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")}
_TENSORS = {name: getattr(Tensor, name) for name in METHODS}


def learn() -> None:
    """Take up the activation classes that have been loaded since. Called when a model is fused, and when one is unpickled."""
    for cls, entry in hf.activations().items():
        _KNOWN.setdefault(cls, entry)


def activation_of(activation: Any, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> str | None:
    """The name of what `activation(x, *args, **options)` applies, or None where fused_linear does not know it.

    activation: a module, a function, or the name of a tensor's method. A module that has hooks or a forward of its own is
    not known. Looked at in each call of a fused forward, and by a compiler.
    """
    entry = _KNOWN.get(type(activation))
    if entry is not None:
        if args or options or type(activation).forward is not entry[1] or not as_its_class_says(activation):
            return None
        return entry[0] if isinstance(entry[0], str) else entry[0](activation)
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
        if not called._modules and not called._parameters and _ACTIVATION_CLASS.search(cls.__name__):
            return True
        return cls in MODULES or (cls.__module__ in ("torch.nn.modules.activation", "transformers.activations") and not any(
            isinstance(called, other) for other in (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention)
        ))  # fmt: skip
    if isinstance(called, str):
        return called in METHODS
    return getattr(called, "__name__", "").rstrip("_") in ACTIVATION_FUNCTIONS


_ACTIVATION_CLASS = re.compile(r"(GELU|Gelu|ReLU|Relu|SiLU|Swish|Sigmoid|Tanh|Mish|ELU|Softplus|Activation)\w*$")
ACTIVATION_FUNCTIONS = frozenset(
    ("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu", "prelu", "rrelu", "glu", "mish",
     "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "tanhshrink", "hardshrink", "softshrink")
)  # fmt: skip
