"""Fused GPU kernels in Triton, from training to the deployed engine.

    from fused_ops import fused_layernorm, fused_linear, fused_softmax

Each function is a drop-in for its torch.nn.functional counterpart: autograd, torch.compile, autocast, torch.func and
export work. CUDA tensors run Triton kernels; CPU tensors run ATen, or the same kernels when TRITON_INTERPRET=1 was set
before the import.
"""

from typing import Any

from . import nn
from ._fuse import FuseReport, fuse, unfuse
from ._runtime.settings import check_ops as _check_ops
from ._torch.compile import compile_with_aten
from ._torch.spec import REGISTRY
from .ops.linear.gated_linear import fused_gated_linear
from .ops.linear.linear import fused_linear
from .ops.linear.linear_fp8 import fused_linear_fp8
from .ops.linear.mlp import fused_mlp
from .ops.norm.layer_norm import fused_layernorm
from .ops.norm.layer_norm_fp8 import fused_layernorm_fp8
from .ops.norm.rms_norm import fused_rmsnorm
from .ops.softmax.softmax import fused_softmax

__version__ = "0.1.0"
__all__ = [
    "REGISTRY", "FuseReport", "compile_with_aten", "explain", "explain_compiled", "fuse", "fused_gated_linear", "fused_layernorm",
    "fused_layernorm_fp8", "fused_linear", "fused_linear_fp8", "fused_mlp", "fused_rmsnorm", "fused_softmax", "nn", "unfuse",
]  # fmt: skip
_check_ops(REGISTRY)


def __getattr__(name: str) -> Any:
    if name == "explain":  # imported when first asked for
        from ._tools.explain import explain

        return explain
    if name == "explain_compiled":
        from ._tools.explain_compiled import explain_compiled

        return explain_compiled
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
