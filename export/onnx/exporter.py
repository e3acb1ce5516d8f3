"""ONNX export with standard operators only. Names and dimensions are the user's; the file is checked before it appears."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..files.atomic import ExportError, PathLike, check_onnx, check_writable, output, require
from ..files.manifest import write_manifest
from ..program import Args, dim_names, evaluating, exported_program, quiet, split_args, tensor_inputs, tensor_outputs
from .graph import check_names, rename_dims, rename_folded_weights, rename_nodes, rename_values
from .precision import PRECISIONS, convert_precision

OPSETS = range(18, 26)  # torch's exporter starts at 18; at 26 it logs its failure and writes 18


def export_onnx(
    model: nn.Module | ExportedProgram,
    args: Args,
    path: PathLike,
    *,
    dynamic_shapes: Any = None,
    opset: int = 20,
    attention_operator: bool = False,
    precision: str = "fp32",
    keep_fp32: Sequence[str] = ("norm", "softmax"),
    keep_io_types: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    drop_unused_inputs: bool = False,
    external_data_bytes: int = 1_900_000_000,
) -> Path:
    """Write a model as ONNX with standard operators only, so that the file runs without fused_ops.

    Args:
        model: a module, fused or not, exported in eval mode (its own mode is restored), or an ExportedProgram.
        args: example inputs: a tuple, a dict of keyword inputs, or one tensor. Empty for an ExportedProgram.
        path: the file to write. It appears whole and checked, or not at all; an existing file survives a failure.
        dynamic_shapes: as torch.export's: {"input_ids": {0: Dim("batch"), 1: Dim("sequence", max=512)}}, or a tuple
            in the order of args. A string in place of a Dim names a dimension of any size; equal names are one dimension.
        opset: 18 to 25. LayerNormalization, Gelu and Softmax are single operators at 20, RMSNormalization at 23.
        attention_operator: from opset 23, write scaled_dot_product_attention as one Attention operator. Its softmax's
            precision is then the runtime's choice, and TensorRT-RTX 1.7 builds it in fp16 only. Otherwise it is MatMul,
            Softmax, MatMul.
        precision: "fp32" leaves the model's own dtypes; "fp16" and "bf16" turn its fp32 weights and activations into
            that dtype, in the graph, so that strongly typed engines follow it.
        keep_fp32: what stays fp32 under "fp16" and "bf16": "norm", "softmax", an ONNX operator type ("Gelu"), or a module
            path, where * stays inside one part and ** crosses parts ("encoder.layer.*.output"). A node's name is
            <module path>/<operator>.
        keep_io_types: True keeps the graph's inputs and outputs in fp32 under "fp16" and "bf16", with Casts inside the
            graph. False gives them the precision too.
        input_names, output_names: names in order; by default forward's argument names and the keys of its result.
        metadata: strings for the file's metadata_props, beside fused_ops' and torch's versions and the precision.
        drop_unused_inputs: leave out inputs that no output depends on.
        external_data_bytes: if all weights together exceed this many bytes, they are written to <path>.data, because
            a protobuf file is limited to 2 GB.

    Returns:
        The absolute path.

    Raises:
        ExportError: a bad argument, a model that cannot be traced, or an invalid result; nothing is written.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    op = "export_onnx"
    _check_arguments(op, model, opset, precision, metadata)
    if attention_operator and opset < 23:
        raise ExportError(f"{op}: attention_operator: got True at opset {opset}, allowed: opset 23 and above")
    for package in ("onnx", "onnxscript"):
        require(package, "onnx")
    target = check_writable(op, path)
    program = exported_program(op, model, args, dynamic_shapes)
    inputs, outputs = tensor_inputs(program), tensor_outputs(program)
    weights = set(program.state_dict)
    check_names(op, "input_names", input_names, len(inputs), weights)
    check_names(op, "output_names", output_names, len(outputs), weights | set(input_names or inputs))

    onnx_model = _translate(op, program, opset, attention_operator)
    graph = onnx_model.graph
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise ExportError(f"{op}: {len(graph.inputs)} inputs and {len(graph.outputs)} outputs came for {inputs} and {outputs}")
    rename_dims(onnx_model, dim_names(program, args, dynamic_shapes))
    rename_values(onnx_model, input_names or inputs, output_names or outputs, soft=output_names is None)
    rename_folded_weights(onnx_model, program.state_dict)
    rename_nodes(onnx_model)
    _tidy(onnx_model)
    if drop_unused_inputs:
        for value in [v for v in graph.inputs if not v.uses()]:
            graph.inputs.remove(value)
    if precision != "fp32":
        convert_precision(onnx_model, precision, keep_fp32, keep_io_types)
    _finish(onnx_model, precision, keep_fp32, metadata)
    _save(op, onnx_model, target, opset, external_data_bytes)
    return target


def _check_arguments(op: str, model: object, opset: int, precision: str, metadata: Mapping[str, str] | None) -> None:
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise TypeError(f"{op}: model: got {type(model).__name__}, allowed: a torch.nn.Module or an ExportedProgram")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{op}: model: got a ScriptModule, allowed: the torch.nn.Module it was made from")
    if opset not in OPSETS:
        raise ExportError(f"{op}: opset: got {opset}, allowed: {OPSETS[0]} to {OPSETS[-1]}")
    if precision not in PRECISIONS:
        raise ExportError(f"{op}: precision: got {precision!r}, allowed: {', '.join(map(repr, PRECISIONS))}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{op}: metadata: got {key!r}: {value!r}, allowed: strings")


def _translate(op: str, program: ExportedProgram, opset: int, attention_operator: bool) -> Any:
    """Translate the program to an onnx_ir.Model of exactly this opset, with constants folded; ExportError if torch cannot."""
    table: dict[Any, Any] | None = None
    if opset >= 23 and not attention_operator:
        torchlib = require("onnxscript.function_libs.torch_lib.ops.nn", "onnx")
        attention = torch.ops.aten.scaled_dot_product_attention.default
        table = {attention: torchlib.aten_scaled_dot_product_attention}
    try:
        with quiet(), torch.no_grad():
            result = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, optimize=True, verbose=False, custom_translation_table=table
            )
    except Exception as error:
        raise ExportError(f"{op}: torch.onnx cannot translate the model: {error}") from error
    if result is None or result.model.opset_imports.get("") != opset:
        got = None if result is None else result.model.opset_imports.get("")
        raise ExportError(f"{op}: opset: torch.onnx wrote {got}, not the requested {opset}")
    return result.model


def _tidy(model: Any) -> None:
    """Turn constants into initializers, remove unused nodes and opsets, and give every output a value of its own."""
    passes = require("onnx_ir.passes.common", "onnx")
    for step in ("LiftConstantsToInitializersPass", "RemoveUnusedNodesPass", "RemoveUnusedOpsetsPass", "OutputFixPass"):
        getattr(passes, step)()(model)


def _finish(model: Any, precision: str, keep_fp32: Sequence[str], metadata: Mapping[str, str] | None) -> None:
    """Infer the shapes and dtypes of all values, and record producer, versions, precision and the caller's metadata."""
    from ... import __version__

    require("onnx_ir.passes.common", "onnx").ShapeInferencePass()(model)
    for node in model.graph:
        node.metadata_props.clear()
    model.producer_name, model.producer_version = "fused_ops", __version__
    model.metadata_props.clear()
    model.metadata_props.update({"fused_ops.version": __version__, "torch.version": torch.__version__})
    model.metadata_props["fused_ops.precision"] = precision
    if precision != "fp32":
        model.metadata_props["fused_ops.keep_fp32"] = ",".join(keep_fp32)
    model.metadata_props.update(metadata or {})


def _save(op: str, model: Any, target: Path, opset: int, external_data_bytes: int) -> None:
    """Write the model and its manifest to a temporary folder, check the file there, and only then move them to target."""
    onnx_ir = require("onnx_ir", "onnx")
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = f"{target.name}.data" if size > external_data_bytes else None
    with output(op, target) as staged:
        onnx_ir.save(model, staged, external_data=external)
        proto = check_onnx(staged, op=op)
        versions = {o.domain: o.version for o in proto.opset_import}
        if versions != {"": opset}:
            raise ExportError(f"{op}: the file has opsets {versions}, allowed: {{'': {opset}}} only")
        write_manifest(staged, "onnx", opset={"ai.onnx": opset}, metadata={p.key: p.value for p in proto.metadata_props})


def export_submodule(
    model: nn.Module, name: str, example: Args, path: PathLike, *, dynamic_shapes: Any = None, **options: Any
) -> Path:
    """Export one submodule of a model. Its example inputs are captured from a forward pass of the whole model.

    Args:
        model: the whole module, run once in eval mode.
        name: the part, as model.get_submodule names it: "encoder.layer.0".
        example: inputs of the whole model, as for export_onnx.
        path: the file to write.
        dynamic_shapes: of the part's own inputs, or None for static ones.
        **options: further options of export_onnx. Inputs that the part does not use are left out by default.

    Returns:
        The absolute path.

    Raises:
        ExportError: there is no such submodule, the forward does not call it, or export_onnx fails.
    """
    op = "export_submodule"
    try:
        part = model.get_submodule(name)
    except AttributeError as error:
        raise ExportError(f"{op}: name: got {name!r}, allowed: a name of named_modules() ({error})") from None
    check_writable(op, path)
    args, kwargs = _captured(op, model, part, name, example)
    options.setdefault("drop_unused_inputs", True)
    return export_onnx(part, _bound(part, args, kwargs), path, dynamic_shapes=dynamic_shapes, **options)


def _captured(op: str, model: nn.Module, part: nn.Module, name: str, example: Args) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of `part` in a forward of `model` on `example`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = part.register_forward_pre_hook(record, with_kwargs=True)
    try:
        args, kwargs = split_args(model, example)
        with evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        handle.remove()
    if not calls:
        raise ExportError(f"{op}: name: got {name!r}, which the forward does not call, allowed: a part that it calls")
    return calls[0]


def _bound(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Args:
    """The arguments of a call as a dict by part.forward's parameter names, or as a tuple if forward takes *args."""
    bound = inspect.signature(part.forward).bind(*args, **kwargs)
    parameters = bound.signature.parameters
    if any(parameters[name].kind is inspect.Parameter.VAR_POSITIONAL for name in bound.arguments):
        return args
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if value is None and parameters[name].default is None:
            continue
        named.update(value if parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named
