"""Compare an exported file with the module it came from, at several shapes: errors, cosine, positions of NaN and infinities."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..files.atomic import ExportError, PathLike, check_input, check_onnx, require
from ..program import Args, evaluating, split_args
from .bf16 import widened

TOLERANCES = {"fp32": (1e-4, 0.9999), "fp16": (1e-2, 0.999), "bf16": (6e-2, 0.99), "int8": (math.inf, 0.98)}
MAX_FILE_BYTES = 64 * 2**30


@dataclass(frozen=True)
class Comparison:
    """One output of one example. Errors are over elements finite in both; relative_error is max_abs / max|reference|."""

    example: int
    inputs: str
    output: str
    shape: tuple[int, ...]
    max_abs: float
    relative_error: float
    cosine: float
    nan_mismatches: int
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What verify found. ok: every comparison is within its bounds; exit_status: 0 when ok, else 1."""

    path: str
    runtime: str
    max_relative_error: float
    min_cosine: float
    rows: list[Comparison] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def exit_status(self) -> int:
        return 0 if self.ok else 1

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable data."""
        return {**asdict(self), "ok": self.ok}

    def table(self) -> Any:
        """The report as a rich table."""
        title = f"{Path(self.path).name} by {self.runtime}: {'ok' if self.ok else 'FAILED'}"
        table = require("rich.table", "cli").Table(title=title, caption=self._bounds())
        for column in ("inputs", "output", "max abs", "relative", "cosine", "NaN/inf differ", "verdict"):
            table.add_column(column, justify="left" if column in ("inputs", "output", "verdict") else "right")
        for row in self.rows:
            table.add_row(*self._cells(row), style=None if row.ok else "bold red")
        return table

    def __rich__(self) -> Any:
        return self.table()

    def __str__(self) -> str:
        lines = [f"{self.path} by {self.runtime}: {'ok' if self.ok else 'FAILED'} ({self._bounds()})"]
        return "\n".join(lines + ["  " + "  ".join(self._cells(row)) for row in self.rows])

    def _bounds(self) -> str:
        return f"bounds: relative error at most {self.max_relative_error:g}, cosine at least {self.min_cosine:g}"

    @staticmethod
    def _cells(row: Comparison) -> list[str]:
        numbers = [f"{row.max_abs:.2e}", f"{row.relative_error:.2e}", f"{row.cosine:.7f}", str(row.nan_mismatches)]
        return [row.inputs, f"{row.output} {list(row.shape)}", *numbers, "ok" if row.ok else row.reason]


def verify(
    path: PathLike,
    model: nn.Module,
    inputs: Args | Sequence[Args],
    *,
    max_relative_error: float | None = None,
    min_cosine: float | None = None,
    runtime: str | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Report:
    """Compare an exported file with the module it came from.

    Args:
        path: an ONNX file (run by ONNX Runtime), a TorchScript file (.pt, .ts), an AOTInductor package (.pt2), or a
            TensorRT engine (.engine, .plan; needs a GPU).
        model: the module, run in eval mode where its parameters are.
        inputs: one example as for export_onnx (a tuple, a dict, a tensor), or a list of examples. Choose shapes unlike
            the exported one: that is what shows a dimension that was baked in.
        max_relative_error: bound on max|file - model| / max|model| of each output. Default by the file's precision:
            1e-4 for fp32, 1e-2 for fp16, 6e-2 for bf16; none for int8.
        min_cosine: bound on the cosine of each output; by default 0.9999, 0.999, 0.99, and 0.98 for int8.
        runtime: "onnxruntime", "reference" (onnx's slow evaluator), "torchscript", "aoti", "tensorrt"; by default from
            the file name. ONNX Runtime has no bf16 products on the CPU: such a file runs in fp32, each value rounded.
        providers: ONNX Runtime's execution providers.

    Returns:
        A Report: ok, exit_status, rows, table() for rich, as_dict() for JSON. It fails if NaN or infinities differ in place.

    Raises:
        ExportError: the file is missing or not valid, or the inputs do not fit it.
    """
    op = "verify"
    examples: list[Any] = list(inputs) if isinstance(inputs, list) else [inputs]
    if not examples:
        raise ExportError(f"{op}: inputs: got an empty list, allowed: at least one example")
    name, run, names, precision = _open(op, path, runtime, providers)
    relative, cosine = TOLERANCES[precision]
    relative = relative if max_relative_error is None else max_relative_error
    cosine = cosine if min_cosine is None else min_cosine
    report = Report(str(path), name, relative, cosine)
    for index, example in enumerate(examples):
        args, kwargs = split_args(model, example)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        with evaluating(model), torch.no_grad():
            expected = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        shapes = " ".join(str(list(t.shape)) for t in tensors)
        try:
            got = run(tensors, dict(kwargs))
        except ExportError:
            raise
        except Exception as error:  # a dimension that was baked in shows as the runtime's refusal
            reason = f"{name} refuses: {' '.join(str(error).split())[:300]}"
            report.rows.append(Comparison(index, shapes, "", (), math.nan, math.nan, math.nan, 0, False, reason))
            continue
        if len(got) != len(expected):
            raise ExportError(f"{op}: {str(path)!r} gives {len(got)} outputs, the model {len(expected)}")
        for number, (one, other) in enumerate(zip(got, expected)):
            label = names[number] if number < len(names) else f"output_{number}"
            report.rows.append(compare(_wide(one), _wide(other), index, shapes, label, relative, cosine))
    return report


def _wide(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    return np.asarray(value).astype(np.float64)


def compare(
    got: np.ndarray, expected: np.ndarray, example: int, inputs: str, output: str, max_relative: float, min_cosine: float
) -> Comparison:
    """Compare one output with the model's, both as fp64 arrays."""
    if got.shape != expected.shape:
        reason = f"shape {got.shape}, not {expected.shape}"
        return Comparison(example, inputs, output, got.shape, math.nan, math.nan, math.nan, 0, False, reason)
    same = (np.isnan(got) == np.isnan(expected)) & (np.isposinf(got) == np.isposinf(expected))
    mismatches = int((~(same & (np.isneginf(got) == np.isneginf(expected)))).sum())
    finite = np.isfinite(got) & np.isfinite(expected)
    a, b = got[finite], expected[finite]
    max_abs = float(np.abs(a - b).max(initial=0.0))
    scale = float(np.abs(b).max(initial=0.0))
    relative = max_abs / scale if scale else (0.0 if max_abs == 0 else math.inf)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else (1.0 if max_abs == 0 else 0.0)
    reasons = []
    if mismatches:
        reasons.append(f"{mismatches} NaN or infinities in unequal places")
    if not relative <= max_relative:
        reasons.append(f"relative error {relative:.2e} > {max_relative:g}")
    if not cosine >= min_cosine - 1e-12:
        reasons.append(f"cosine {cosine:.6f} < {min_cosine:g}")
    reason = "; ".join(reasons)
    return Comparison(example, inputs, output, got.shape, max_abs, relative, cosine, mismatches, not reasons, reason)


Runner = Callable[[list[torch.Tensor], dict[str, Any]], list[Any]]


def _open(op: str, path: PathLike, runtime: str | None, providers: Sequence[str]) -> tuple[str, Runner, list[str], str]:
    """Open a file: (name of its runtime, function that runs it, output names, precision as a key of TOLERANCES)."""
    kinds = {".onnx": "onnxruntime", ".pt": "torchscript", ".ts": "torchscript", ".pth": "torchscript", ".pt2": "aoti"}
    kinds |= {".engine": "tensorrt", ".plan": "tensorrt", ".trt": "tensorrt"}
    kind = runtime or kinds.get(Path(path).suffix)
    if kind in ("onnxruntime", "reference"):
        return _open_onnx(op, path, kind, providers)
    source = str(check_input(op, path, max_bytes=MAX_FILE_BYTES))
    if kind == "torchscript":
        extra = {"fused_ops.json": ""}
        try:
            module = torch.jit.load(source, _extra_files=extra)
            names = [str(name) for name in json.loads(extra["fused_ops.json"] or b"{}").get("outputs", [])]
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise ExportError(f"{op}: path: {source!r} is no TorchScript file: {str(error).splitlines()[0]}") from None
        return kind, _by_call(module), names, _dtype_of(module.parameters())
    if kind == "aoti":
        try:
            package = torch._inductor.aoti_load_package(source)
        except Exception as error:  # torch's have many types
            said = (str(error).splitlines() or [repr(error)])[0]
            raise ExportError(f"{op}: path: {source!r} is no AOTInductor package: {said}") from None
        return kind, _by_call(package, keywords=True), [], "fp32"
    if kind == "tensorrt":
        from ..tensorrt.build import Engine

        engine: Any = Engine.load(source)
        names = [info.name for info in engine.outputs]
        return kind, lambda tensors, _: list(engine(*engine.moved(tensors)).values()), names, "fp16"
    allowed = "a file that ends in " + ", ".join(kinds)
    raise ExportError(f"{op}: path: got {str(path)!r} with runtime {runtime!r}, allowed: {allowed}, or a runtime of verify")


def _by_call(module: Any, keywords: bool = False) -> Runner:
    """A Runner that calls a loaded module.

    keywords: inputs exported by name are passed by name (AOTInductor); otherwise all are passed in order (TorchScript).
    """

    def run(tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> list[Any]:
        named = kwargs if keywords and all(isinstance(value, torch.Tensor) for value in kwargs.values()) else {}
        with torch.no_grad():
            result = module(*tensors[: len(tensors) - len(named)], **named)
        return [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]

    return run


def _dtype_of(parameters: Any) -> str:
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return next((names[p.dtype] for p in parameters if p.dtype in names), "fp32")


def _open_onnx(op: str, path: PathLike, kind: str, providers: Sequence[str]) -> tuple[str, Runner, list[str], str]:
    model = check_onnx(path, op=op)
    precision = _precision_of(model)
    outputs = [value.name for value in model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    if kind == "onnxruntime":
        try:
            session = onnx_session(path, providers)
        except Exception as error:
            if "NOT_IMPLEMENTED" not in str(error) or precision != "bf16":
                raise ExportError(f"{op}: ONNX Runtime refuses {str(path)!r}: {error}") from None
            session = onnx_session(
                widened(require("onnx", "onnx").load(str(path))).SerializeToString(), providers, optimize=False
            )
            types = {name: 1 if kind == 16 else kind for name, kind in types.items()}
            kind = "onnxruntime, fp32 rounded to bf16"
        return kind, lambda t, k: session.run(None, feeds(op, types, t, k)), outputs, precision
    evaluator = require("onnx.reference", "onnx").ReferenceEvaluator(str(path))
    return kind, lambda t, k: evaluator.run(None, feeds(op, types, t, k)), outputs, precision


def onnx_session(path: PathLike | bytes, providers: Sequence[str] = ("CPUExecutionProvider",), optimize: bool = True) -> Any:
    """An ONNX Runtime session on a file or a serialised model; only fatal errors are logged."""
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path if isinstance(path, bytes) else str(path), options, providers=list(providers))


def _precision_of(model: Any) -> str:
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        return "int8"
    types = {i.data_type for i in model.graph.initializer} | {v.type.tensor_type.elem_type for v in model.graph.value_info}
    return "bf16" if 16 in types else "fp16" if 10 in types else "fp32"


def feeds(
    op: str, types: Mapping[str, int], tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """ONNX Runtime's input dictionary: inputs by name if kwargs names exactly all of them, else tensors in order."""
    numpy_type = require("onnx.helper", "onnx").tensor_dtype_to_np_dtype
    if kwargs and len(kwargs) == len(types) and set(kwargs) == set(types):
        pairs = [(name, kwargs[name]) for name in types]
    elif len(tensors) == len(types):
        pairs = list(zip(types, tensors))
    else:
        raise ExportError(f"{op}: inputs: got {len(tensors)} tensors, allowed: one for each of {', '.join(types)}")
    result = {}
    for name, tensor in pairs:
        tensor = tensor.detach().cpu()
        array = tensor.float().numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
        result[name] = array.astype(numpy_type(types[name]), copy=False) if tensor.is_floating_point() else array
    return result
