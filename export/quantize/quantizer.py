"""Quantise the linears of an ONNX file by calibration (QDQ), and measure what each of them costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files.atomic import ExportError, PathLike, check_onnx, check_writable, output, require, sha256_of
from ..files.manifest import write_manifest
from .calibration import METHODS, Feed, activation_ranges, as_feeds, progress_bar, run
from .modelopt import quantized_by_modelopt
from .qdq import choose_linears, insert_qdq, linears_of, weight_bytes

MAX_BYTES = 1_900_000_000
Metric = Callable[[list[np.ndarray], dict[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class QuantizationReport:
    """What quantize_onnx did.

    quantized, kept: node names of the linears. ranges: (low, high) of each quantised activation. cosine_mean, cosine_min:
    the cosine to the fp32 file's output over the evaluation data, nan without such data.
    """

    path: str
    method: str
    quantized: list[str]
    kept: list[str]
    ranges: dict[str, tuple[float, float]] = field(repr=False)
    cosine_mean: float = float("nan")
    cosine_min: float = float("nan")

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable data."""
        return asdict(self)


@dataclass(frozen=True)
class LayerSensitivity:
    """The cosine to fp32 when only this node is quantised: mean and min over the vectors of the evaluation data."""

    node: str
    cosine_mean: float
    cosine_min: float


@dataclass(frozen=True)
class SensitivityReport:
    """One row for each linear, sorted by mean cosine: the most harmful linear first."""

    path: str
    method: str
    rows: list[LayerSensitivity]

    def propose_exclude(self, min_cosine: float) -> list[str]:
        """The fewest nodes to leave in fp32 so that the mean cosine is predicted to reach min_cosine.

        The prediction adds up the losses 1 - cosine of the nodes that stay quantised, as if they were independent.
        Quantise with the proposal and measure it on other data.
        """
        loss = sum(1 - row.cosine_mean for row in self.rows)
        exclude = []
        for row in self.rows:
            if loss <= 1 - min_cosine:
                break
            exclude.append(row.node)
            loss -= 1 - row.cosine_mean
        return exclude

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable data."""
        return asdict(self)

    def table(self) -> Any:
        """The report as a rich table."""
        table = require("rich.table", "cli").Table(
            title=f"{Path(self.path).name}: one linear in INT8 at a time ({self.method})"
        )
        for column in ("node", "mean cosine", "min cosine", "1 - mean"):
            table.add_column(column, justify="left" if column == "node" else "right")
        for row in self.rows:
            table.add_row(row.node, f"{row.cosine_mean:.6f}", f"{row.cosine_min:.6f}", f"{1 - row.cosine_mean:.1e}")
        return table

    def __rich__(self) -> Any:
        return self.table()


@dataclass(frozen=True)
class _Calibrated:
    model: Any
    linears: dict[str, Any]  # node name -> NodeProto
    feeds: list[dict[str, np.ndarray]]
    ranges: dict[str, tuple[np.float32, np.float32]]  # activation name -> (low, high)


def quantize_onnx(
    path: PathLike,
    out: PathLike,
    calibration: Iterable[Feed],
    *,
    method: str = "minmax",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    bins: int = 2048,
    quantized_bins: int = 128,
    percentile: float = 99.99,
    per_channel: bool = True,
    precision: str = "int8",
    backend: str = "onnxruntime",
    evaluation: Iterable[Feed] | None = None,
    metric: Metric | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Write an INT8 or FP8 (QDQ) version of an fp32 ONNX file.

    Inputs and weights of the linears are quantised, symmetrically, as TensorRT requires.

    Args:
        path: the fp32 ONNX file. A linear is a MatMul or Gemm whose second input is a weight.
        out: the file to write. It appears whole and checked, or not at all.
        calibration: batches, each a dict of arrays or tensors by input name; lengths may differ.
        method: how an activation's range is chosen. "minmax": all of it. "percentile": cut the tails. "entropy": the
            range whose quantised histogram is closest in Kullback-Leibler divergence.
        include, exclude: module paths or node names, with * inside one part of the path and ** across parts
            ("encoder.layer.*.output.dense"); default all linears.
        bins, quantized_bins: histogram bins for "percentile" and "entropy", and levels that "entropy" merges them into;
            there must be more bins than levels, or it has nothing to choose from.
        percentile: for "percentile": per cent of the magnitudes that lie inside the range.
        per_channel: one scale a weight column instead of one a weight; modelopt always does.
        precision: "int8", or "fp8" (e4m3), which takes backend="modelopt".
        backend: "onnxruntime", or "modelopt" (nvidia-modelopt, with its own "minmax" and "entropy" and no bins).
        evaluation: batches not used in calibration; the report then holds the cosine to the fp32 file.
        metric: function (outputs, inputs) of a batch to an array, whose rows along the last dimension are compared by
            cosine; by default the first output.
        progress: draw a bar.

    Returns:
        QuantizationReport.

    Raises:
        ExportError: a bad argument or file, or a pattern that matches no linear; nothing is written.
    """
    op = "quantize_onnx"
    target = check_writable(op, out)
    _check_backend(op, precision, backend)
    calibrated = _calibrate(
        op, path, calibration, method, include, exclude, bins, quantized_bins, percentile, progress, backend == "onnxruntime"
    )
    held_out = None if evaluation is None else as_feeds(op, "evaluation", evaluation, _inputs(calibrated.model))
    names = list(calibrated.linears)
    if backend == "modelopt":
        model = quantized_by_modelopt(op, Path(path), names, calibrated.feeds, precision, method)
    else:
        model = insert_qdq(calibrated.model, calibrated.ranges, names, per_channel)
    del model.metadata_props[:]
    model.metadata_props.extend(calibrated.model.metadata_props)
    model.metadata_props.add(key="fused_ops.quantized", value=precision)
    mean = low = float("nan")
    if held_out is not None:
        mean, low = _cosines(_run(op, calibrated.model, held_out, metric), _run(op, model, held_out, metric))
    with output(op, target) as staged:
        require("onnx", "onnx").save(model, str(staged))
        check_onnx(staged, op=op)
        source = {"file": Path(path).name, "sha256": sha256_of(path)}
        write_manifest(staged, "onnx", source=source, quantized=names, method=method, precision=precision)
    kept = [name for name in linears_of(calibrated.model) if name not in calibrated.linears]
    ranges = {name: (float(a), float(b)) for name, (a, b) in calibrated.ranges.items()}
    return QuantizationReport(str(target), method, names, kept, ranges, mean, low)


def _check_backend(op: str, precision: str, backend: str) -> None:
    if backend not in ("onnxruntime", "modelopt"):
        raise ExportError(f"{op}: backend: got {backend!r}, allowed: 'onnxruntime', 'modelopt'")
    if precision not in ("int8", "fp8"):
        raise ExportError(f"{op}: precision: got {precision!r}, allowed: 'int8', 'fp8'")
    if precision == "fp8" and backend != "modelopt":
        raise ExportError(f"{op}: precision: got 'fp8' with backend {backend!r}, allowed: 'int8', or backend='modelopt'")
    if backend == "modelopt":
        require("modelopt", "modelopt")


def sensitivity(
    path: PathLike,
    calibration: Iterable[Feed],
    *,
    evaluation: Iterable[Feed] | None = None,
    method: str = "minmax",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    bins: int = 2048,
    quantized_bins: int = 128,
    percentile: float = 99.99,
    per_channel: bool = True,
    metric: Metric | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Measure what each linear costs in accuracy: quantise it alone, and compare the output with the fp32 file's by cosine.

    The arguments are those of quantize_onnx. evaluation: batches to measure on, by default the calibration batches. Judge
    the final choice on data that neither this function nor the calibration has seen.
    """
    op = "sensitivity"
    calibration = list(calibration)
    calibrated = _calibrate(op, path, calibration, method, include, exclude, bins, quantized_bins, percentile, progress)
    data = as_feeds(op, "evaluation", calibration if evaluation is None else evaluation, _inputs(calibrated.model))
    expected = _run(op, calibrated.model, data, metric)
    rows = []
    with progress_bar("one linear at a time", len(calibrated.linears), progress) as advance:
        for name in calibrated.linears:
            mean, low = _cosines(
                expected, _run(op, insert_qdq(calibrated.model, calibrated.ranges, [name], per_channel), data, metric)
            )
            rows.append(LayerSensitivity(name, mean, low))
            advance()
    return SensitivityReport(str(path), method, sorted(rows, key=lambda row: row.cosine_mean))


def _calibrate(
    op: str, path: PathLike, calibration: Iterable[Feed], method: str, include: Sequence[str] | None, exclude: Sequence[str],
    bins: int, quantized_bins: int, percentile: float, progress: bool, measure: bool = True,
) -> _Calibrated:  # fmt: skip
    """Check the arguments and the file, choose the linears and, if measure is set, find the ranges of their inputs."""
    if method not in METHODS:
        raise ExportError(f"{op}: method: got {method!r}, allowed: {', '.join(map(repr, METHODS))}")
    if method == "entropy" and not bins > quantized_bins > 1:
        # onnxruntime's default of 128 bins for 128 levels chooses nothing: its file equals minmax's
        raise ExportError(
            f"{op}: bins: got {bins} for {quantized_bins} quantized_bins, allowed: more bins than quantized_bins > 1"
        )
    if not 0 < percentile <= 100:
        raise ExportError(f"{op}: percentile: got {percentile}, allowed: above 0, up to 100")
    size = weight_bytes(check_onnx(path, op=op))
    if size > MAX_BYTES:
        raise ExportError(f"{op}: path: got a model of {size} bytes, allowed: up to {MAX_BYTES}, as protobuf ends at 2 GB")
    model = require("onnx", "onnx").load(str(path))
    linears = choose_linears(op, model, include, exclude)
    feeds = as_feeds(op, "calibration", calibration, _inputs(model))
    ranges: dict[str, tuple[np.float32, np.float32]] = {}
    if measure:
        ranges = activation_ranges(
            op, model, sorted({node.input[0] for node in linears.values()}), feeds, method=method, bins=bins,
            quantized_bins=quantized_bins, percentile=percentile, show=progress,
        )  # fmt: skip
    return _Calibrated(model, linears, feeds, ranges)


def _inputs(model: Any) -> list[str]:
    weights = {i.name for i in model.graph.initializer}
    return [v.name for v in model.graph.input if v.name not in weights]


def _run(op: str, model: Any, feeds: Sequence[dict[str, np.ndarray]], metric: Metric | None) -> np.ndarray:
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = []
    for feed in feeds:
        outputs = run(op, session, None, feed)
        value = outputs[0] if metric is None else metric(outputs, feed)
        rows.append(np.asarray(value, np.float64).reshape(-1, value.shape[-1]))
    return np.concatenate(rows)


def _cosines(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """(mean, min) of the cosine of corresponding rows; equal zero rows count as 1."""
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(got, axis=1)
    dots = (expected * got).sum(1)
    same = (expected == got).all(1)
    cosine = np.where(same, 1.0, dots / np.where(norms == 0, 1.0, norms))
    return float(cosine.mean()), float(cosine.min())
