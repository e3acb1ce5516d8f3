"""Convert an ONNX graph (onnx_ir) to fp16 or bf16. Casts mark what stays fp32, so that every engine must follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..files.atomic import ExportError, require
from .graph import matches

PRECISIONS = ("fp32", "fp16", "bf16")
NORMS = frozenset(
    ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
     "LpNormalization", "MeanVarianceNormalization", "ReduceL2", "ReduceSumSquare")
)  # fmt: skip
SOFTMAXES = frozenset(("Softmax", "LogSoftmax", "ReduceLogSumExp"))
LARGEST_EPSILON = 1e-3


def convert_precision(model: Any, precision: str, keep_fp32: Sequence[str], keep_io_types: bool) -> None:
    """Convert the fp32 part of a graph to fp16 or bf16, in place. The graph's nodes must be in topological order.

    Every node computes in the low dtype, with three exceptions that stay fp32: nodes that keep_fp32 selects, operators
    that do not take the low dtype, and positions and angles (integers on their way to Sin, Cos, Log or back to an index).
    A Cast is inserted wherever the two dtypes meet. Finite constants beyond the low dtype's range become its largest
    number, so that a mask of finfo.min stays finite.

    Raises:
        ExportError: the graph has control flow (If, Loop, Scan), or an entry of keep_fp32 matches no node.
    """
    ir = require("onnx_ir", "onnx")
    float32, low = ir.DataType.FLOAT, {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    graph = model.graph
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for n in graph
        for attribute in n.attributes.values()
    ):
        raise ExportError(f"precision: got {precision!r} for a graph with control flow (If, Loop, Scan), allowed: 'fp32'")
    kept = _kept_nodes(graph, keep_fp32)
    floats = {v for v in _values(graph) if v.dtype == float32}
    if not keep_io_types:
        for value in graph.inputs:
            if value in floats:
                value.type = ir.TensorType(low)
    typed = _Typed(graph, ir)
    for node in list(graph):
        allowed = _low_positions(node, model.opset_imports[""], low)
        wide = node in kept
        if node.op_type != "Cast":
            for i, value in enumerate(node.inputs):
                if value is not None and value in floats:
                    node.replace_input_with(i, typed(value, float32 if wide or not allowed("inputs", i) else low))
        for i, value in enumerate(node.outputs):
            if value in floats and not wide and allowed("outputs", i):
                value.type = ir.TensorType(low)  # a new object: values may share one
        if node.outputs[0] in floats and not wide:
            _lower_attributes(node, low, ir)
    wanted = float32 if keep_io_types else low
    for i, value in enumerate(list(graph.outputs)):
        if value in floats and value.dtype != wanted:
            typed.output(i, value, wanted)
    for value in [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[value.name]
    typed.restore_names()


def _values(graph: Any) -> Iterable[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def lowered(array: np.ndarray, low: Any) -> np.ndarray:
    """array converted to the low dtype. Finite numbers beyond its range become its largest one; infinities and NaN stay."""
    ml_dtypes = require("ml_dtypes", "onnx")
    dtype = np.dtype(low.numpy())
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.where(np.isfinite(array), np.clip(array, -largest, largest), array).astype(dtype)


class _Typed:
    """Gives a value in the dtype that a node needs: the value itself, a converted copy of a weight, or one shared Cast."""

    def __init__(self, graph: Any, ir: Any) -> None:
        self.graph, self.ir = graph, ir
        self.made: dict[tuple[int, int], Any] = {}
        self.copies: list[tuple[Any, str]] = []

    def __call__(self, value: Any, dtype: Any) -> Any:
        if value.dtype == dtype:
            return value
        key = (id(value), int(dtype))
        if key not in self.made:
            self.made[key] = self._copy(value, dtype) if value.is_initializer() else self._cast(value, dtype)
        return self.made[key]

    def _copy(self, value: Any, dtype: Any) -> Any:
        name = f"{value.name}_{_short(dtype)}"
        tensor = self.ir.tensor(lowered(value.const_value.numpy(), dtype), dtype=dtype, name=name)
        copy = self.ir.Value(name=name, type=self.ir.TensorType(dtype), shape=value.shape, const_value=tensor)
        self.graph.register_initializer(copy)
        self.copies.append((copy, value.name))
        return copy

    def restore_names(self) -> None:
        """Give a converted weight its original name if the fp32 weight is no longer in the graph."""
        for copy, name in self.copies:
            if name not in self.graph.initializers:
                copy.name = name

    def _cast(self, value: Any, dtype: Any, name: str = "") -> Any:
        node = self.ir.node("Cast", [value], {"to": self.ir.AttrInt64("to", int(dtype))})
        node.name = f"{value.name}/Cast_{_short(dtype)}"
        cast = node.outputs[0]
        cast.name, cast.type, cast.shape = name or f"{value.name}_{_short(dtype)}", self.ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.append(node)
        return cast

    def output(self, index: int, value: Any, dtype: Any) -> None:
        """Make output `index` of the graph a Cast of value to dtype. The Cast takes over the value's name."""
        name = value.name
        value.name = f"{name}_{_short(value.dtype)}"
        self.graph.outputs[index] = self._cast(value, dtype, name)


def _short(dtype: Any) -> str:
    return {1: "fp32", 10: "fp16", 16: "bf16"}[int(dtype)]


def _low_positions(node: Any, opset: int, low: Any) -> Callable[[str, int], bool]:
    """A function (side, index): whether the operator admits the low dtype for that one of its "inputs" or "outputs"."""
    onnx = require("onnx", "onnx")
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    name = {10: "tensor(float16)", 16: "tensor(bfloat16)"}[int(low)]

    def allowed(side: str, index: int) -> bool:
        formal = getattr(schema, side)
        return bool(formal) and name in formal[min(index, len(formal) - 1)].types

    return allowed


def _lower_attributes(node: Any, low: Any, ir: Any) -> None:
    """Set the low dtype in the attribute by which a Cast, a random or a constant operator chooses its output's dtype."""
    attributes = node.attributes
    if node.op_type == "Cast":
        attributes["to"] = ir.AttrInt64("to", int(low))
    elif node.op_type in ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "EyeLike", "Bernoulli"):
        attributes["dtype"] = ir.AttrInt64("dtype", int(low))
    elif node.op_type in ("ConstantOfShape", "Constant"):
        value = attributes["value"].as_tensor().numpy() if "value" in attributes else np.zeros(1, np.float32)
        attributes["value"] = ir.AttrTensor("value", ir.tensor(lowered(value, low), dtype=low))


def _kept_nodes(graph: Any, keep_fp32: Sequence[str]) -> set[Any]:
    """The nodes that stay fp32: those that keep_fp32 selects, and those that turn integers into positions and angles."""
    if isinstance(keep_fp32, str) or not all(isinstance(k, str) for k in keep_fp32):
        raise ExportError(f"keep_fp32: got {keep_fp32!r}, allowed: a sequence of strings")
    kept = _integer_maths(graph)
    for key in keep_fp32:
        if key == "norm":
            found = [
                n for n in graph if n.op_type in NORMS or "norm" in n.metadata_props.get("class", "").rpartition(".")[2].lower()
            ]
            for node in graph:
                found.extend(_guarded_division(node))
        elif key == "softmax":
            found = [n for n in graph if n.op_type in SOFTMAXES]
        else:
            found = [n for n in graph if n.op_type == key or matches(n.name or "", key)]
            if not found:
                raise ExportError(
                    f"keep_fp32: got {key!r}, allowed: 'norm', 'softmax', an operator type or a pattern of node names in the graph"
                )
        kept.update(found)
    return kept


def _guarded_division(node: Any) -> list[Any]:
    """The nodes of a norm written in primitive operators, found from `node`, the one that adds the norm's epsilon.

    They are the reduction, the epsilon, the root and the division. Empty if `node` is not part of such a norm.
    """
    if node.op_type not in ("Add", "Max", "Clip") or not any(
        _epsilon(v) for v in node.inputs[1 if node.op_type == "Clip" else 0 :]
    ):
        return []
    group, divides, todo = [node], False, [node]
    while todo:
        current = todo.pop()
        for user, index in [use for out in current.outputs for use in out.uses()]:
            if user.op_type in ("Sqrt", "Reciprocal", "Pow", "Expand", "Unsqueeze"):
                divides = divides or user.op_type in ("Sqrt", "Reciprocal")
                todo.append(user)
            elif not (user.op_type == "Div" and index == 1) and not (user.op_type == "Mul" and divides):
                continue
            divides = divides or user.op_type == "Div"
            group.append(user)
    if not divides:
        return []
    todo = [node]
    while todo:
        for value in todo.pop().inputs:
            maker = value.producer() if value is not None else None
            if maker is None or maker in group:
                continue
            square = maker.op_type == "Mul" and maker.inputs[0] is maker.inputs[1]
            if square or maker.op_type in ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "Pow", "Sub", "Sqrt"):
                group.append(maker)
                todo.append(maker)
    return group


def _epsilon(value: Any) -> bool:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return False
    return 0 < float(value.const_value.numpy().reshape(-1)[0]) <= LARGEST_EPSILON


def _integer_maths(graph: Any) -> set[Any]:
    """The float nodes that compute positions: from integers and constants only, for a Sin, Cos, Log or Cast to integer.

    They stay fp32 because fp16 holds no odd number above 2048: rotary angles and relative-position buckets would be wrong.
    """
    derived: set[Any] = set()
    for node in graph:
        makers = [v.producer() for v in node.inputs if v is not None and not v.is_initializer() and v.dtype is not None]
        seed = node.op_type in ("Cast", "Range") and all(
            not v.dtype.is_floating_point() for v in node.inputs if v is not None and v.dtype
        )
        if seed or (
            makers and any(m in derived for m in makers) and all(m is None or m in derived or _integral(m) for m in makers)
        ):
            derived.add(node)
    kept: set[Any] = set()
    todo = [n for n in derived if n.op_type in ("Sin", "Cos", "Log") or (n.op_type == "Cast" and _integral(n))]
    while todo:
        node = todo.pop()
        if node not in kept:
            kept.add(node)
            todo.extend(m for v in node.inputs if v is not None and (m := v.producer()) is not None and m in derived)
    return kept


def _integral(node: Any) -> bool:
    return all(v.dtype is not None and not v.dtype.is_floating_point() for v in node.outputs)
