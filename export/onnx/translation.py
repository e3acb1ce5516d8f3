"""ONNX translations of the raw operators, for users who call torch.onnx.export themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..._torch.spec import REGISTRY
from ..files.atomic import ExportError, require


def custom_translation_table(opset: int = 20) -> dict[Any, Callable[..., Any]]:
    """The table for torch.onnx.export(model, args, dynamo=True, opset_version=opset, custom_translation_table=...).

    Maps each raw forward operator of softmax, layer_norm and linear to standard ONNX operators of that opset. Other
    families, and backward operators, go through ExportedProgram.run_decompositions, as export_onnx does for all.

    Raises:
        ExportError: an opset below 18.
        ModuleNotFoundError: onnxscript is not installed.
    """
    if opset < 18:
        raise ExportError(f"custom_translation_table: opset: got {opset}, allowed: 18 and above")
    # onnxscript has no name for the newest opsets (opset24): build the builder from the number
    op = require("onnxscript.values", "onnx").Opset("", opset)

    def softmax_fwd(x, dim: int, dtype: int | None = None):  # type: ignore[no-untyped-def]
        if dtype is not None and dtype != -1:
            x = op.Cast(x, to=dtype)
        return op.Softmax(x, axis=dim)

    def layer_norm_fwd(x, weight=None, bias=None, eps: float = 1e-5):  # type: ignore[no-untyped-def]
        if weight is None:
            size = x.shape[-1]
            if not isinstance(size, int):
                raise ExportError("layer_norm: without weight its last dimension cannot be dynamic")
            weight = op.CastLike(op.Constant(value=_tensor(np.ones(size, np.float32))), x)
        # all three results by name: returning LayerNormalization's tuple as one value would become Reshape and Concat
        y, mean, rstd = op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps, stash_type=1, _outputs=3)
        last = op.Constant(value_ints=[-1])
        return y, op.Squeeze(mean, last), op.Squeeze(rstd, last)

    def linear_fwd(x, weight, bias=None, activation: str = "none", save_pre: bool = False):  # type: ignore[no-untyped-def]
        pre = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        if bias is not None:
            pre = op.Add(pre, bias)
        y = _activation(op, opset, pre, activation)
        return y, op.Identity(pre)

    names: dict[str, Callable[..., Any]] = {"softmax": softmax_fwd, "layer_norm": layer_norm_fwd, "linear": linear_fwd}
    return {REGISTRY[name].fwd: function for name, function in names.items()}


def _tensor(array: np.ndarray) -> Any:
    return require("onnx.numpy_helper", "onnx").from_array(array)


def _activation(op: Any, opset: int, x: Any, name: str) -> Any:
    """Build one of fused_linear's activations on x from operators of the opset; ExportError for an unknown name."""

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
        raise ExportError(f"linear: no ONNX translation of the activation {name!r}")
    return simple[name]()
