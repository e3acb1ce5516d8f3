"""Fused forms of transformers' own layers: its Conv1D (GPT-2) and its activation classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import activations as hf
from transformers.pytorch_utils import Conv1D

from ..ops.linear.linear import fused_linear
from .activations import Absorbed, Entry


class FusedConv1D(Conv1D):
    """transformers' Conv1D, a Linear whose weight is (in, out), with the activation that follows it."""

    activation: str | None

    def forward(self, x: Tensor) -> Tensor:
        return fused_linear(x, self.weight.t(), self.bias, self.activation)


# transformers' class -> fused_linear's activation. A name that this version of transformers lacks is left out.
NAMES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "ReLUSquaredActivation": "relu2",
}


def _absorbed(cls: type[nn.Module]) -> type[nn.Module]:
    """The identity subclass of cls, a name of this module so that it pickles."""
    fused = type(f"Absorbed{cls.__name__}", (Absorbed, cls), {"__module__": __name__, "__doc__": Absorbed.__doc__})
    globals()[fused.__name__] = fused
    return fused


def _named(name: str) -> Any:
    return lambda module: name


MODULES: dict[type[nn.Module], Entry] = {
    getattr(hf, cls): (_absorbed(getattr(hf, cls)), _named(name)) for cls, name in NAMES.items() if hasattr(hf, cls)
}
