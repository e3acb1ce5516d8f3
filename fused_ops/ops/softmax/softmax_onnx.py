"""Softmax in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def softmax_onnx(op: Any, opset: int) -> Callable[..., Any]:
    """softmax_fwd as Softmax, after a Cast where a dtype is given. op: the builder of the opset's operators."""

    def softmax_fwd(x, dim: int, dtype: int | None = None):  # type: ignore[no-untyped-def]
        if dtype is not None and dtype != -1:
            x = op.Cast(x, to=dtype)
        return op.Softmax(x, axis=dim)

    return softmax_fwd
