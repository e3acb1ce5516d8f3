"""Layer norm in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FLOAT, DOUBLE = 1, 11  # of onnx.TensorProto


def layer_norm_onnx(op: Any, opset: int) -> Callable[..., Any]:
    """layer_norm_fwd as LayerNormalization, computed in fp32. op: the builder of the opset's operators.

    The operator takes tensors of one dtype. Where x, weight and bias have several, all are cast to fp32 (fp64 for fp64 x), and its
    result to x's. The function raises ValueError without a weight where the last dimension is dynamic.
    """

    def layer_norm_fwd(x, weight=None, bias=None, eps: float = 1e-5):  # type: ignore[no-untyped-def]
        dtype, like = _dtype_of(x), x
        mixed = any(parameter is not None and _dtype_of(parameter) != dtype for parameter in (weight, bias))
        if mixed:
            wide = DOUBLE if dtype == DOUBLE else FLOAT
            x, weight, bias = (None if value is None else op.Cast(value, to=wide) for value in (x, weight, bias))
        if weight is None:
            size = like.shape[-1]
            if not isinstance(size, int):
                raise ValueError("layer_norm: without weight its last dimension cannot be dynamic")
            weight = op.CastLike(op.Constant(value_floats=[1.0] * size), x)
        # all three results by name: returning LayerNormalization's tuple as one value would become Reshape and Concat
        y, mean, rstd = op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps, stash_type=1, _outputs=3)
        last = op.Constant(value_ints=[-1])
        return op.CastLike(y, like) if mixed else y, op.Squeeze(mean, last), op.Squeeze(rstd, last)

    return layer_norm_fwd


def _dtype_of(value: Any) -> Any:
    return getattr(value.dtype, "value", value.dtype)
