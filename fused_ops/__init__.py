"""Fused GPU kernels in Triton, from training to the deployed engine.

    from fused_ops import fused_layernorm, fused_linear, fused_softmax

Each function is a drop-in for its torch.nn.functional counterpart: autograd, torch.compile, autocast, torch.func and
export work. CUDA tensors run Triton kernels; CPU tensors run ATen, or the same kernels when TRITON_INTERPRET=1 was set
before the import.
"""

from typing import Any

from . import nn
from ._compile import compile_with_aten
from ._fuse import FuseReport, fuse, unfuse
from ._spec import REGISTRY
from .gated_linear import fused_gated_linear
from .layer_norm import fused_layernorm
from .layer_norm_fp8 import fused_layernorm_fp8
from .linear import fused_linear
from .linear_fp8 import fused_linear_fp8
from .mlp import fused_mlp
from .softmax import fused_softmax

__version__ = "0.1.0"
__all__ = [
    "REGISTRY", "FuseReport", "compile_with_aten", "explain", "fuse", "fused_gated_linear", "fused_layernorm",
    "fused_layernorm_fp8", "fused_linear", "fused_linear_fp8", "fused_mlp", "fused_softmax", "nn", "unfuse",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "explain":  # imported when first asked for
        from ._explain import explain

        return explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
