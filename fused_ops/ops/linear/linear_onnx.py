"""The linear and its activations in standard ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def linear_onnx(op: Any, opset: int) -> Callable[..., Any]:
    """linear_fwd as MatMul, Add and its activation. op: the builder of the opset's operators."""

    def linear_fwd(x, weight, bias=None, activation: str = "none", save_pre: bool = False):  # type: ignore[no-untyped-def]
        pre = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        if bias is not None:
            pre = op.Add(pre, bias)
        return activation_onnx(op, opset, pre, activation), op.Identity(pre)

    return linear_fwd


def activation_onnx(op: Any, opset: int, x: Any, name: str) -> Any:
    """One of fused_linear's activations on x in operators of the opset; ValueError for an unknown name."""

    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), x)

    if name in ("gelu", "gelu_tanh") and opset >= 20:
        return op.Gelu(x, approximate="none" if name == "gelu" else "tanh")
    if name == "gelu":
        return op.Mul(op.Mul(x, number(0.5)), op.Add(op.Erf(op.Mul(x, number(math.sqrt(0.5)))), number(1.0)))
    if name == "gelu_tanh":
        inner = op.Mul(number(math.sqrt(2 / math.pi)), op.Add(x, op.Mul(number(0.044715), op.Mul(x, op.Mul(x, x)))))
        return op.Mul(op.Mul(x, number(0.5)), op.Add(op.Tanh(inner), number(1.0)))
    simple: dict[str, Callable[[], Any]] = {
        "none": lambda: x,
        "relu": lambda: op.Relu(x),
        "sigmoid": lambda: op.Sigmoid(x),
        "tanh": lambda: op.Tanh(x),
        "silu": lambda: op.Mul(x, op.Sigmoid(x)),
        "quick_gelu": lambda: op.Mul(x, op.Sigmoid(op.Mul(x, number(1.702)))),
        "relu2": lambda: op.Mul(op.Relu(x), op.Relu(x)),
    }
    if name not in simple:
        raise ValueError(f"linear: no ONNX translation of the activation {name!r}")
    return simple[name]()
