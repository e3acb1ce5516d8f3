"""What the tests of export_onnx share: the examples to verify at, and what an exported file says."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.export import models

SHAPES = [models.example(1, 1), models.example(3, 7), models.example(4, 33)]


def dims(value: Any) -> list[Any]:
    """The dimensions of an input or output, names and numbers."""
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def operators(model: Any) -> Counter[str]:
    """How many nodes of each operator a model has."""
    return Counter(node.op_type for node in model.graph.node)


def types_of(model: Any) -> dict[str, int]:
    """The element type of each value."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in model.graph.initializer}
