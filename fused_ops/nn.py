"""Modules over the fused functions: subclasses of torch.nn's, with the same constructor arguments and the same state_dict.

    from fused_ops.nn import FusedLayerNorm, FusedLinear, FusedRMSNorm, FusedSoftmax

A checkpoint of the torch.nn class loads into the fused one and back. `fused_ops.fuse(model)` turns a model's own modules
into these in place. Each forward is one call of its function, whatever the input is: so torch.fx.symbolic_trace,
torch.jit.script and torch.compile(fullgraph=True) take them, and nested tensors and parameters of other libraries' classes
(torchao's quantised weights) are computed by torch's own functions.
"""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from .ops.linear.activations import check_activation
from .ops.linear.linear import fused_linear
from .ops.norm.layer_norm import fused_layernorm
from .ops.norm.rms_norm import fused_rmsnorm
from .ops.softmax.softmax import fused_softmax

__all__ = ["FusedLayerNorm", "FusedLinear", "FusedRMSNorm", "FusedSoftmax"]


class FusedLayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm computed by fused_layernorm.

    Shape: input (*, *normalized_shape), output the same, contiguous, in input's dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        return fused_layernorm(input, self.normalized_shape, self.weight, self.bias, self.eps)  # type: ignore[arg-type]


class FusedRMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm computed by fused_rmsnorm.

    Shape: input (*, *normalized_shape), output the same, contiguous, in input's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        return fused_rmsnorm(x, self.normalized_shape, self.weight, self.eps)  # type: ignore[arg-type]


class FusedSoftmax(nn.Softmax):
    """torch.nn.Softmax computed by fused_softmax. With dim=None, which torch deprecates, it is torch's own.

    Shape: input (*), output the same, contiguous, in input's dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        dim = self.dim
        if dim is None:
            return F.softmax(input, dim, _stacklevel=5)
        return fused_softmax(input, dim)


class FusedLinear(nn.Linear):
    """torch.nn.Linear with the activation that follows it, computed by fused_linear: activation(input @ weight^T + bias).

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear's.
        activation: None, or one of fused_linear's names; it holds no state and so is not in the state_dict.

    Shape: input (*, in_features), output (*, out_features), in input's dtype.

    Tools that look for the exact class torch.nn.Linear leave this one as it is, without a word: so torch.ao.quantization's
    quantize_dynamic quantises no FusedLinear. (It could not: its own linear has no activation.) Write
    torch.nn.Linear and its activation and let fuse(model) join them, or use a tool that replaces weights: torchao's quantize_.

    Raises:
        RuntimeError: an unknown activation.
        TypeError: an activation that is no string.
    """

    __constants__ = ["in_features", "out_features", "activation"]  # noqa: RUF012 (torch's own form)
    activation: Optional[str]

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None,
        *, activation: Optional[str] = None,
    ) -> None:  # fmt: skip
        if activation is not None:
            check_activation("FusedLinear", activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return fused_linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")
