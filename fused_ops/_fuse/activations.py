"""Which activation a function or a method is, in fused_linear's names; and the modules that stand where one was fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Places = tuple[tuple[dict[str, Any], str], ...]  # (a module's table of children, a key in it): where Linears are


class Absorbed:
    """Mixin of an activation module that the Linears before it now apply: its forward returns its input.

    _fuse_linears says where those Linears are, so that replacing one later (by PEFT, say) is an error and not a wrong
    result.
    """

    if TYPE_CHECKING:  # torch.jit.script reads annotations, and cannot read this one
        _fuse_linears: Places

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            still_there(self._fuse_linears)
        return input


class AbsorbedFunction:
    """Absorbed for an activation function that a module held as an attribute."""

    def __init__(self, linears: Places) -> None:
        self._fuse_linears = linears

    def __call__(self, input: Tensor) -> Tensor:
        still_there(self._fuse_linears)
        return input


def still_there(linears: Places) -> None:
    """Raise when a Linear that took over an activation is no longer in its place."""
    for modules, key in linears:
        if getattr(modules.get(key), "activation", None) is None:
            raise RuntimeError(
                f"fuse: the Linear {key!r}, which applied the activation after it, was replaced after fuse by"
                f" {type(modules.get(key)).__name__}: call unfuse(model) before such a change and fuse(model) after it"
            )


class AbsorbedReLU(Absorbed, nn.ReLU):
    """nn.ReLU, applied by the FusedLinear before it."""


class AbsorbedGELU(Absorbed, nn.GELU):
    """nn.GELU, applied by the FusedLinear before it."""


class AbsorbedSiLU(Absorbed, nn.SiLU):
    """nn.SiLU, applied by the FusedLinear before it."""


class AbsorbedSigmoid(Absorbed, nn.Sigmoid):
    """nn.Sigmoid, applied by the FusedLinear before it."""


class AbsorbedTanh(Absorbed, nn.Tanh):
    """nn.Tanh, applied by the FusedLinear before it."""


# class -> (its identity subclass, the name of the activation for one instance or None). Exact classes only.
Entry = tuple[type[nn.Module], Callable[[Any], "str | None"]]
MODULES: dict[type[nn.Module], Entry] = {
    nn.ReLU: (AbsorbedReLU, lambda m: "relu"),
    nn.GELU: (AbsorbedGELU, lambda m: _gelu(m.approximate)),
    nn.SiLU: (AbsorbedSiLU, lambda m: "silu"),
    nn.Sigmoid: (AbsorbedSigmoid, lambda m: "sigmoid"),
    nn.Tanh: (AbsorbedTanh, lambda m: "tanh"),
}
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid",
    F.tanh: "tanh", torch.tanh: "tanh",
}  # fmt: skip
METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}


def _gelu(approximate: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def function_activation(function: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> str | None:
    """The activation that function(x, *args[1:], **kwargs) applies, by name, or None. inplace makes no difference."""
    name = FUNCTIONS.get(function) if callable(function) else None
    options = {key: value for key, value in (kwargs or {}).items() if key != "inplace"}
    if name == "gelu":
        name = _gelu(options.pop("approximate", "none"))
    positional = 2 if function in (F.relu, F.silu) else 1  # the second is inplace
    return name if not options and len(args) <= positional else None
