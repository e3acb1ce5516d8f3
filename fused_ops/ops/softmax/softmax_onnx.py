"""Softmax in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16  # numbers of ONNX's TensorProto.DataType


def softmax_onnx(op: Any, opset: int) -> Callable[..., Any]:
    """softmax_fwd as Softmax, with the Casts that a dtype needs: before it where the input is no wider, else after it.

    op: the builder of the opset's operators.
    """

    def softmax_fwd(x, dim: int, dtype: int | None = None):  # type: ignore[no-untyped-def]
        if dtype is None or dtype in (-1, x.dtype):
            return op.Softmax(x, axis=dim)
        if x.dtype == DOUBLE or (x.dtype == FLOAT and dtype != DOUBLE):
            return op.Cast(op.Softmax(x, axis=dim), to=dtype)
        wide = DOUBLE if dtype == DOUBLE else FLOAT
        y = op.Softmax(op.Cast(x, to=wide), axis=dim)
        return y if dtype == wide else op.Cast(y, to=dtype)

    return softmax_fwd
