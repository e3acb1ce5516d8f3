"""INT8 and FP8 quantisation by nvidia-modelopt. It writes FLOAT8E4M3FN, which onnxruntime's quantizer cannot."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files.atomic import ExportError, require

METHODS = {"minmax": "max", "entropy": "entropy"}


class _Reader:
    """The calibration data reader that modelopt asks for. It can be rewound, and shapes may differ between batches."""

    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self.feeds, self.next = feeds, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.next += 1
        return self.feeds[self.next - 1] if self.next <= len(self.feeds) else None

    def get_first(self) -> dict[str, np.ndarray]:
        return self.feeds[0]

    def rewind(self) -> None:
        self.next = 0


def quantized_by_modelopt(
    op: str, path: Path, nodes: Sequence[str], feeds: Sequence[dict[str, np.ndarray]], precision: str, method: str
) -> Any:
    """The onnx.ModelProto of the file at path with the named linears quantised, and nothing else."""
    if method not in METHODS:
        raise ExportError(f"{op}: method: got {method!r} with modelopt, allowed: {', '.join(map(repr, METHODS))}")
    quantization = require("modelopt.onnx.quantization", "modelopt")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder, "quantized.onnx")
        try:
            quantization.quantize(
                str(path), quantize_mode=precision, calibration_method=METHODS[method], calibration_data_reader=_Reader(feeds),
                calibration_eps=["cpu"], op_types_to_quantize=["MatMul", "Gemm"], high_precision_dtype="fp32", disable_mha_qdq=True,
                nodes_to_quantize=[re.escape(node) + "$" for node in nodes], output_path=str(out), log_level="ERROR",
            )  # fmt: skip
        except Exception as error:
            raise ExportError(f"{op}: modelopt cannot quantise {str(path)!r}: {error}") from error
        return require("onnx", "onnx").load(str(out))
