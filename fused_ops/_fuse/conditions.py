"""What must hold of a module for a fused call to stand in its place: asked when fusing, and again in every fused call.

Each question is about classes and values, never about which object it is, so that a compiler makes one graph for all the
layers of a model.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.arguments import FLOATS, ordinary

_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


def as_its_class_says(module: nn.Module) -> bool:
    """Whether calling module is its class's forward and no more: no hook, no forward or __call__ of its own."""
    return type(module).__call__ is nn.Module.__call__ and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not repeats_class_forward(module))
    )


def hooks(module: nn.Module) -> str | None:
    """A reason when module has hooks: a fused call would pass them by."""
    found = [what for attribute, what in _HOOKS.items() if module.__dict__.get(attribute)]
    return f"has {' and '.join(found)}: remove it and call fuse again" if found else None


def repeats_class_forward(module: nn.Module) -> bool:
    """Whether module has a forward attribute that is only its class's own: accelerate leaves one where it took its hooks off."""
    own = module.__dict__.get("forward")
    return isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward


def replaced_forward(module: nn.Module) -> str | None:
    """A reason when something (accelerate's device hooks, say) has put its own forward on the instance."""
    if "forward" not in module.__dict__ or repeats_class_forward(module):
        return None
    return "its forward was replaced on the instance: fuse before that, or take it back first"


def parameters(module: nn.Module) -> str | None:
    """A reason when weight or bias is no ordinary float parameter: quantised, distributed, or computed by another module."""
    for name in ("weight", "bias"):
        if isinstance(getattr(type(module), name, None), property):
            return f"{name} is no parameter but computed (parametrisation, weight or spectral norm)"
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter:
            if type(tensor) is Tensor:
                return f"{name} is no parameter but computed (parametrisation, weight or spectral norm)"
            if type(tensor).__name__ == "DTensor":
                return f"{name} is a DTensor: fuse before the model is parallelised"
            if not ordinary(tensor):
                return f"{name} is a {type(tensor).__name__} (quantised or a tensor subclass)"
        if tensor.dtype not in FLOATS:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')} (quantised)"
        if tensor.layout is not torch.strided:
            return f"{name} has layout {tensor.layout}"
    return None


def takes(x: Any) -> bool:
    """Whether a fused function takes x: a float tensor, not nested, sparse or of a class that another tool brings."""
    return isinstance(x, Tensor) and x.dtype in FLOATS and ordinary(x)


def subclass(module: nn.Module, base: type[nn.Module]) -> str:
    """What an unknown subclass of base is called in the report."""
    cls = type(module)
    if cls.__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight and never calls it"
    if hasattr(module, "parametrizations"):
        return "has a parametrisation: remove it (parametrize.remove_parametrizations) and call fuse again"
    if cls.__name__.startswith("FSDP"):
        return f"{cls.__name__}: fuse before fully_shard"
    if getattr(cls, "forward", None) is base.forward:
        return f"no call of it was found, and {cls.__module__}.{cls.__name__} is a subclass of {base.__name__}"
    return (
        f"{cls.__module__}.{cls.__name__} is a subclass of {base.__name__} with a forward of its own, which fuse does not know"
    )


def in_peft(parent: nn.Module) -> str | None:
    """A reason when parent is one of PEFT's layers: it adds to this Linear's output before any activation."""
    for cls in type(parent).__mro__:
        if cls.__module__.split(".")[0] == "peft":
            return f"is wrapped by PEFT's {type(parent).__name__}: merge the adapter, or train without fusing this layer"
    return None


def torch_fast_path(layer: nn.Module | None) -> str:
    """What the report adds for a part of torch's TransformerEncoderLayer, whose inference fast path calls no module."""
    if not isinstance(layer, nn.TransformerEncoderLayer) or not layer.activation_relu_or_gelu:
        return ""
    return "; torch's own fast path (eval, no grad) reads the weights directly and bypasses it where it applies"
