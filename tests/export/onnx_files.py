"""Small ONNX files, made with onnx.helper, that the export tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PROFILE = {"x": ((1, 1, 16), (4, 8, 16), (8, 32, 16))}


def linear_model(batch: int | str = "batch", sequence: int | str = "sequence") -> Any:
    """y = relu(x @ w + b), x (batch, sequence, 16)."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((16, 8), dtype=np.float32), "w"),
        numpy_helper.from_array(rng.standard_normal((8,), dtype=np.float32), "b"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
        helper.make_node("Add", ["h", "b"], ["a"], "bias"),
        helper.make_node("Relu", ["a"], ["y"], "activation"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, sequence, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, sequence, 8])
    return model(helper.make_graph(nodes, "linear", [x], [y], weights))


def model(graph: Any, opset: int = 20) -> Any:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def save(proto: Any, path: Path) -> Path:
    onnx.save(proto, str(path))
    return path
