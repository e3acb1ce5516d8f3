"""Why a module must be left as it is: what fuse checks before it touches one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._torch.arguments import FLOATS

_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


def hooks(module: nn.Module) -> str | None:
    """A reason when module has hooks: they would see another tensor once an activation moves into the Linear."""
    found = [what for attribute, what in _HOOKS.items() if module.__dict__.get(attribute)]
    return f"has {' and '.join(found)}" if found else None


def replaced_forward(module: nn.Module) -> str | None:
    """A reason when something (accelerate's device hooks, say) has put its own forward on the instance."""
    return "its forward was replaced on the instance" if "forward" in module.__dict__ else None


def parameters(module: nn.Module) -> str | None:
    """A reason when weight or bias is no ordinary float parameter: quantised, distributed, or computed by another module."""
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter:
            if type(tensor) is Tensor:
                return f"{name} is no parameter but computed (parametrisation, weight or spectral norm)"
            if type(tensor).__name__ == "DTensor":
                return f"{name} is a DTensor: fuse before the model is parallelised"
            return f"{name} is a {type(tensor).__name__} (quantised or a tensor subclass)"
        if tensor.dtype not in FLOATS:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')} (quantised)"
        if tensor.layout is not torch.strided:
            return f"{name} has layout {tensor.layout}"
    return None


def subclass(module: nn.Module, base: type[nn.Module]) -> str:
    """What an unknown subclass of base is called in the report."""
    cls = type(module)
    if cls.__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight and never calls it"
    if hasattr(module, "parametrizations"):
        return "has a parametrisation"
    if cls.__name__.startswith("FSDP"):
        return f"{cls.__name__}: fuse before fully_shard"
    return f"{cls.__module__}.{cls.__name__} is a subclass of {base.__name__} that fuse does not know"


def in_peft(parent: nn.Module) -> str | None:
    """A reason when parent is one of PEFT's layers: it adds to this Linear's output before any activation."""
    for cls in type(parent).__mro__:
        if cls.__module__.split(".")[0] == "peft":
            return f"is wrapped by PEFT's {type(parent).__name__}"
    return None


def torch_fast_path(layer: nn.Module | None) -> str:
    """What the report adds for a part of torch's TransformerEncoderLayer, whose inference fast path calls no module."""
    if not isinstance(layer, nn.TransformerEncoderLayer) or not layer.activation_relu_or_gelu:
        return ""
    return "; torch's own fast path (eval, no grad) reads the weights directly and bypasses it where it applies"
