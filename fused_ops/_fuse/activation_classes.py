"""The activation modules that fuse knows: torch.nn's, and transformers' once transformers is loaded."""

from __future__ import annotations

from torch import nn

from . import hf
from .activations import MODULES, Entry


def activation_classes() -> dict[type[nn.Module], Entry]:
    """class -> (its identity subclass, the name of the activation for one instance or None)."""
    loaded = hf.classes()
    return MODULES if loaded is None else {**MODULES, **loaded.MODULES}


def module_activation(module: nn.Module) -> str | None:
    """The name of the activation that module applies, or None where fused_linear does not know it."""
    entry = activation_classes().get(type(module))
    return None if entry is None else entry[1](module)
