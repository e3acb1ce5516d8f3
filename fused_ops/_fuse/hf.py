"""What fuse knows of transformers' own layers: its Conv1D (GPT-2), its activation classes and its choice of attention.

transformers is never imported here: where the program has not loaded it, no model can hold one of its layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Union

import torch.nn.functional as F
from torch import nn

# transformers' class -> fused_linear's activation. A name that a version of transformers lacks is left out.
_NAMES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "ReLUSquaredActivation": "relu2",
}
Name = Union[str, Callable[[Any], "str | None"]]
Entry = tuple[Name, Any]


def conv1d() -> type[nn.Module] | None:
    """transformers' Conv1D, a Linear whose weight is (in, out), or None while it is not loaded."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def activations() -> dict[type[nn.Module], Entry]:
    """class -> (the name of the activation that it applies, its forward), of the classes that are loaded."""
    module = sys.modules.get("transformers.activations")
    classes = ((getattr(module, cls, None), cls, name) for cls, name in _NAMES.items())
    return {cls: (_named(spelled, name), cls.forward) for cls, spelled, name in classes if cls is not None}


def _named(cls: str, name: str) -> Name:
    if cls == "GELUActivation":  # it holds the function that it applies
        return lambda module: name if module.act is F.gelu or getattr(module.act, "__name__", "") == "_gelu_python" else None
    return name


def attention_calls(module: nn.Module, function: str) -> bool:
    """Whether module's attention calls its file's own function, rather than one of another implementation."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return chosen in (None, "eager") or function != "eager_attention_forward"
