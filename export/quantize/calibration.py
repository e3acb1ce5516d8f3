"""Measure the ranges of activations over calibration data, with the collectors of onnxruntime.quantization."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..files.atomic import ExportError, require

Feed = Mapping[str, Any]
METHODS = ("minmax", "percentile", "entropy")


def as_feeds(op: str, argument: str, data: Iterable[Feed], inputs: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Convert batches to feeds of ONNX Runtime, dicts of numpy arrays by input name. Shapes may differ between batches.

    Raises:
        ExportError: there is no batch, or one is not a dict with exactly the inputs' names.
    """
    feeds = []
    for batch in data:
        if not isinstance(batch, Mapping) or set(batch) != set(inputs):
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ExportError(f"{op}: {argument}: got {got}, allowed: dicts with the inputs {', '.join(inputs)}")
        feeds.append({k: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in batch.items()})
    if not feeds:
        raise ExportError(f"{op}: {argument}: got no batches, allowed: at least one")
    return feeds


def run(op: str, session: Any, names: Sequence[str] | None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The session's outputs for a batch; ExportError if ONNX Runtime refuses it."""
    try:
        return list(session.run(names, feed))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in feed.items())
        raise ExportError(f"{op}: ONNX Runtime refuses the batch {shapes}: {' '.join(str(error).split())[:300]}") from None


@contextlib.contextmanager
def progress_bar(description: str, total: int, show: bool) -> Iterator[Any]:
    """Yield a function to call after each step. It advances a rich bar if show is set and rich is installed."""
    if not show:
        yield lambda: None
        return
    try:
        progress = require("rich.progress", "cli")
    except ModuleNotFoundError:
        yield lambda: None
        return
    with progress.Progress(*progress.Progress.get_default_columns(), progress.TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def activation_ranges(
    op: str, model: Any, names: Sequence[str], feeds: Sequence[dict[str, np.ndarray]], *, method: str, bins: int, quantized_bins: int,
    percentile: float, show: bool,
) -> dict[str, tuple[np.float32, np.float32]]:  # fmt: skip
    """(low, high) in fp32 of each named value over all feeds. Feeds are run one by one, so their shapes may differ."""
    onnx, ort = require("onnx", "onnx"), require("onnxruntime", "onnx")
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    types = {v.name: v for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    del watched.graph.output[:]
    watched.graph.output.extend(types[name] for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    collector = None
    if method != "minmax":
        calibrate = require("onnxruntime.quantization.calibrate", "onnx")
        collector = calibrate.HistogramCollector(
            method=method, symmetric=method == "percentile", num_bins=bins, num_quantized_bins=quantized_bins,
            percentile=percentile, scenario="same",
        )  # fmt: skip
    low = {name: np.float32(np.inf) for name in names}
    high = {name: np.float32(-np.inf) for name in names}
    with progress_bar("calibrate", len(feeds), show) as advance, contextlib.redirect_stdout(io.StringIO()):
        for feed in feeds:
            arrays = dict(zip(names, run(op, session, list(names), feed)))
            for name, array in arrays.items():
                low[name], high[name] = min(low[name], array.min()), max(high[name], array.max())
            if collector is not None:
                collector.collect({name: [array.astype(np.float32)] for name, array in arrays.items()})
            advance()
    if collector is None:
        return {name: (np.float32(low[name]), np.float32(high[name])) for name in names}
    with contextlib.redirect_stdout(io.StringIO()), progress_bar("choose ranges", 1, show):
        found = collector.compute_collection_result()
    return {name: (np.float32(found[name][0]), np.float32(found[name][1])) for name in names}
