"""Give dimensions, inputs, outputs, nodes and folded weights of an ONNX graph (onnx_ir) the names that the user knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..files.atomic import ExportError


def matches(name: str, pattern: str) -> bool:
    """Whether a node's name, <module path>/<operator>, matches the pattern or lies below a path that matches it.

    "encoder.layer.0" matches every node of that layer. "*" stays within one part of the path, "**" crosses parts:
    "encoder.layer.*.output.dense" does not match encoder.layer.0.attention.output.dense.
    """
    parts = {"**": ".*", "*": r"[^./]*", "?": r"[^./]"}
    regex = "".join(parts.get(piece) or re.escape(piece) for piece in re.split(r"(\*\*|\*|\?)", pattern))
    return re.fullmatch(regex + r"([./].*)?", name, re.DOTALL) is not None


def all_values(model: Any) -> Iterator[Any]:
    """Every value of the model's graph and subgraphs: inputs, initializers, node outputs."""
    for graph in [model.graph, *model.graph.subgraphs()]:
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def rename_dims(model: Any, names: dict[str, str]) -> None:
    """Replace each symbol in the shapes of all values by its name; a symbol may be part of an expression such as 2*s31."""
    import onnx_ir as ir

    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(re.escape(s) for s in sorted(names, key=len, reverse=True)) + r")\b")
    for value in all_values(model):
        if value.shape is not None and any(isinstance(d, ir.SymbolicDim) for d in value.shape):
            value.shape = ir.Shape(
                pattern.sub(lambda m: names[m.group()], d.value) if isinstance(d, ir.SymbolicDim) and d.value else d
                for d in value.shape
            )


def check_names(op: str, argument: str, names: Sequence[str] | None, count: int, taken: set[str]) -> None:
    """Raise ExportError unless names is None or holds `count` different, non-empty strings, none of them in `taken`."""
    if names is None:
        return
    if isinstance(names, str) or len(names) != count:
        raise ExportError(f"{op}: {argument}: got {names!r}, allowed: {count} names")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise ExportError(f"{op}: {argument}: got {name!r}, allowed: non-empty strings")
        if name in names[:i] or name in taken:
            raise ExportError(
                f"{op}: {argument}: got {name!r}, which is taken, allowed: names that no other input, output or weight has"
            )


def rename_values(model: Any, inputs: Sequence[str], outputs: Sequence[str], soft: bool) -> None:
    """Name the graph's inputs and outputs. Any other value that has one of these names is renamed.

    soft: the output names were not chosen by the user. One that an input or a weight has already gets "_out" appended.
    """
    graph = model.graph
    weights = set(graph.initializers)
    named: dict[str, Any] = dict(zip(inputs, graph.inputs))
    for value, name in zip(graph.outputs, outputs):
        while soft and (name in named or name in weights):
            name += "_out"
        named[name] = value
    taken = set(named) | {v.name for v in all_values(model)}
    for value in list(all_values(model)):
        if value.name in named and named[value.name] is not value:
            base, i = value.name, 1
            while f"{base}_{i}" in taken:
                i += 1
            value.name = f"{base}_{i}"
            taken.add(value.name)
    for name, value in named.items():
        value.name = name


def rename_nodes(model: Any) -> None:
    """Name each node <module path>/<operator>, and drop the exporter's metadata, which holds source lines and paths.

    A product, and the addition of its bias, has the path of the module that holds its weight, whoever reads that: a fused
    forward does not call its Linears.
    """
    seen: dict[str, int] = {}
    for node in model.graph:
        scope, kind = scope_of(node)
        owner = _owner_of_weight(node) if node.op_type in ("MatMul", "Gemm", "Add") else ""
        if owner.startswith(f"{scope}." if scope else ""):
            scope = owner or scope
        node.metadata_props.clear()
        if kind:
            node.metadata_props["class"] = kind
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        number = seen[name] = seen.get(name, -1) + 1
        node.name = f"{name}_{number}" if number else name
    for value in all_values(model):
        value.metadata_props.clear()


def _owner_of_weight(node: Any) -> str:
    """The path of the module whose weight or bias a node reads, as it is or transposed; "" where it reads none."""
    for value in node.inputs:
        if value is None:
            continue
        producer = value.producer()
        if producer is not None and producer.op_type == "Transpose":
            value = producer.inputs[0]
        owner, _, name = value.name.removesuffix(".T").rpartition(".") if value.is_initializer() else ("", "", "")
        if name in ("weight", "bias"):
            return owner
    return ""


def scope_of(node: Any) -> tuple[str, str]:
    """(path, class name) of the module that a node came from; two empty strings for the root module or if not recorded."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    classes = node.metadata_props.get("pkg.torch.onnx.class_hierarchy")
    try:
        scopes, classes = ast.literal_eval(scopes or "[]"), ast.literal_eval(classes or "[]")
    except (SyntaxError, ValueError):
        return "", ""
    if len(scopes) < 2 or len(classes) < 2 or scopes[-2].startswith("_empty_nn_module_stack"):
        return "", ""
    return scopes[-2], classes[-2]


def rename_folded_weights(model: Any, state: dict[str, Any]) -> None:
    """Name the folded transpose of a weight W "W.T": constant folding has named it with a number."""
    candidates: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in state.items():
        if tensor.dim() == 2 and name not in model.graph.initializers:
            candidates.setdefault(tuple(tensor.shape[::-1]), []).append(name)
    for value in list(model.graph.initializers.values()):
        shape = tuple(value.const_value.shape.numpy()) if value.const_value is not None else ()
        if value.name in state or len(shape) != 2 or shape not in candidates:
            continue
        array = value.const_value.numpy()
        for name in candidates[shape]:
            other = state[name].detach().cpu().t()
            if str(other.dtype) != "torch.bfloat16" and np.array_equal(array, other.numpy()):
                if f"{name}.T" not in model.graph.initializers:
                    value.name = f"{name}.T"
                break
