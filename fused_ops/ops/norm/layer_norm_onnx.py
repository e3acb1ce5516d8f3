"""Layer norm in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def layer_norm_onnx(op: Any, opset: int) -> Callable[..., Any]:
    """layer_norm_fwd as LayerNormalization, computed in fp32. op: the builder of the opset's operators.

    The function raises ValueError without a weight where the last dimension is dynamic.
    """

    def layer_norm_fwd(x, weight=None, bias=None, eps: float = 1e-5):  # type: ignore[no-untyped-def]
        if weight is None:
            size = x.shape[-1]
            if not isinstance(size, int):
                raise ValueError("layer_norm: without weight its last dimension cannot be dynamic")
            weight = op.CastLike(op.Constant(value_floats=[1.0] * size), x)
        # all three results by name: returning LayerNormalization's tuple as one value would become Reshape and Concat
        y, mean, rstd = op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps, stash_type=1, _outputs=3)
        last = op.Constant(value_ints=[-1])
        return y, op.Squeeze(mean, last), op.Squeeze(rstd, last)

    return layer_norm_fwd
