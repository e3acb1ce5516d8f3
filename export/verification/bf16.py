"""Run bf16 ONNX files on the CPU, where ONNX Runtime has no bf16 products: in fp32, each result rounded to bf16."""

from __future__ import annotations

from typing import Any

from ..files.atomic import require


def widened(model: Any) -> Any:
    """A copy of a bf16 onnx.ModelProto in fp32, where every value that was bf16 passes through bf16 once.

    An engine that accumulates in fp32 computes the same. The model must record the types of its values (value_info).
    """
    onnx = require("onnx", "onnx")
    FLOAT, BF16 = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    bf16 = {v.name for v in values if v.type.tensor_type.elem_type == BF16}
    for value in (*graph.input, *graph.output):
        if value.name in bf16:
            value.type.tensor_type.elem_type = FLOAT
    del graph.value_info[:]

    def widen(tensor: Any) -> None:
        if tensor.data_type == BF16:
            array = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    for tensor in graph.initializer:
        widen(tensor)
    nodes = []
    for node in list(graph.node):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BF16:
                attribute.i = FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
        rounded = [(i, name) for i, name in enumerate(node.output) if name in bf16]
        for i, name in rounded:
            node.output[i] = f"{name}/exact"
        nodes.append(node)
        for _, name in rounded:
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/exact"], [f"{name}/bf16"], to=BF16))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/bf16"], [name], to=FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    return wide
