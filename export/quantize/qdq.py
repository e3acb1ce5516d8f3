"""Choose the linears of an ONNX graph to quantise, and insert the QuantizeLinear/DequantizeLinear pairs around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..files.atomic import ExportError, require
from ..onnx.graph import matches


def weight_bytes(model: Any) -> int:
    """The size in bytes of a model with its external weights. The weights need not be loaded."""
    external = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer]
    return int(model.ByteSize()) + sum(int(entry.get("length", 0)) for entry in external)


def linears_of(model: Any) -> dict[str, Any]:
    """The nodes that multiply an activation by a weight, by name."""
    weights = {i.name for i in model.graph.initializer}
    return {
        node.name: node
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and node.input[0] not in weights
    }


def choose_linears(op: str, model: Any, include: Sequence[str] | None, exclude: Sequence[str]) -> dict[str, Any]:
    linears = linears_of(model)
    if "" in linears:
        raise ExportError(f"{op}: path: a linear has no name, allowed: a file whose nodes are named, as export_onnx names them")
    types = {i.name: i.data_type for i in model.graph.initializer}
    if any(types[node.input[1]] != 1 for node in linears.values()):  # TensorProto.FLOAT
        raise ExportError(f"{op}: path: got linears that are not fp32, allowed: a file of precision 'fp32'")
    for argument, patterns in (("include", include or ()), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ExportError(f"{op}: {argument}: got the string {patterns!r}, allowed: a sequence of patterns")
        for pattern in patterns:
            if not any(matches(name, pattern) for name in linears):
                raise ExportError(
                    f"{op}: {argument}: got {pattern!r}, allowed: patterns that match a linear, such as {_some(linears)}"
                )
    chosen = {
        name: node
        for name, node in linears.items()
        if (include is None or any(matches(name, p) for p in include)) and not any(matches(name, p) for p in exclude)
    }
    if not chosen:
        raise ExportError(f"{op}: no linear is left to quantise of {len(linears)}")
    return chosen


def _some(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in list(names)[:3]) or "none: the file has no linear"


def _own_weights(model: Any, nodes: set[str]) -> None:
    """Give the named nodes their own copy of each weight that other nodes use too: those must not read it quantised."""
    weights = {i.name: i for i in model.graph.initializer}
    shared = {name for node in model.graph.node if node.name not in nodes for name in node.input if name in weights}
    made: set[str] = set()
    for node in model.graph.node:
        if node.name in nodes and node.input[1] in shared:
            name = f"{node.input[1]}/linear_weight"
            if name not in made:
                made.add(name)
                model.graph.initializer.add().CopyFrom(weights[node.input[1]])
                model.graph.initializer[-1].name = name
            node.input[1] = name


def insert_qdq(model: Any, ranges: Mapping[str, tuple[Any, Any]], nodes: Sequence[str], per_channel: bool) -> Any:
    """A copy of the model with Q/DQ pairs on the inputs and weights of the named nodes, and on nothing else.

    onnxruntime's quantizer hands a quantised tensor to all nodes that read it, the residual connection included. To
    prevent that, the named nodes read their inputs through Identity nodes, which are removed afterwards.
    """
    onnx, quantization = require("onnx", "onnx"), require("onnxruntime.quantization", "onnx")
    calibrate = require("onnxruntime.quantization.calibrate", "onnx")
    qdq = require("onnxruntime.quantization.qdq_quantizer", "onnx")
    original, model = model, onnx.ModelProto()
    model.CopyFrom(original)
    types = {v.name: v for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    private: dict[str, str] = {}
    for node in model.graph.node:
        if node.name in nodes:
            private.setdefault(node.input[0], f"{node.input[0]}/linear_input")
            node.input[0] = private[node.input[0]]
    _own_weights(model, set(nodes))
    for name, copy in private.items():
        model.graph.node.append(onnx.helper.make_node("Identity", [name], [copy], copy))
        model.graph.value_info.add().CopyFrom(types[name])
        model.graph.value_info[-1].name = copy
    data = calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, {copy: ranges[name] for name, copy in private.items()})
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
    }
    int8 = quantization.QuantType.QInt8
    quantizer = qdq.QDQQuantizer(model, per_channel, False, int8, int8, data, list(nodes), [], ["MatMul", "Gemm"], options)
    quantizer.quantize_model()
    result = quantizer.model.model
    origin = {copy: name for name, copy in private.items()}
    for node in result.graph.node:
        node.input[:] = [origin.get(name, name) for name in node.input]
    for graph_list in (result.graph.node, result.graph.value_info):
        for item in [x for x in graph_list if x.name in origin]:
            graph_list.remove(item)
    quantizer.model.topological_sort()
    return result
