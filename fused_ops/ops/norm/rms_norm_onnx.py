"""RMS norm in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FLOAT, DOUBLE = 1, 11  # of onnx.TensorProto
FIRST_OPSET = 23  # with RMSNormalization


def rms_norm_onnx(op: Any, opset: int) -> Callable[..., Any]:
    """rms_norm_fwd as RMSNormalization in fp32 from opset 23 on, before it by ReduceMean. op: the builder of the opset.

    In 16 bits the operator may round before it multiplies with its scale, and runtimes differ in that. So it gets fp32, and
    its result is rounded once, as fused_rmsnorm's.
    """

    def rms_norm_fwd(x, weight=None, eps: float = 1e-6):  # type: ignore[no-untyped-def]
        wide = op.Cast(x, to=DOUBLE if getattr(x.dtype, "value", x.dtype) == DOUBLE else FLOAT)
        mean = op.ReduceMean(op.Mul(wide, wide), op.Constant(value_ints=[-1]), keepdims=1)
        rstd = op.Reciprocal(op.Sqrt(op.Add(mean, op.CastLike(op.Constant(value_float=eps), wide))))
        size = x.shape[-1]
        ones = op.Constant(value_floats=[1.0] * size) if isinstance(size, int) else None
        scale = op.CastLike(weight, wide) if weight is not None else None if ones is None else op.CastLike(ones, wide)
        if opset >= FIRST_OPSET and scale is not None:
            y = op.RMSNormalization(wide, scale, axis=-1, epsilon=eps, stash_type=1)
        else:
            y = op.Mul(wide, rstd)
            y = y if weight is None else op.Mul(y, scale)
        return op.CastLike(y, x), op.Squeeze(rstd, op.Constant(value_ints=[-1]))

    return rms_norm_fwd
