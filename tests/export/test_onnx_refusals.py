"""What export_onnx refuses, in its own words, and that a refusal leaves no file changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops.export import ExportError, export_onnx
from tests.export import models


@pytest.mark.parametrize("opset", [9, 17, 26, 30])
def test_opsets_outside_the_range_are_refused(opset: int, path: Path) -> None:
    with pytest.raises(ExportError, match=f"opset: got {opset}, allowed: 18 to 25"):
        export_onnx(models.make("mlp"), (models.example(),), path, opset=opset)


def test_wrong_opset_from_the_exporter_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an opset it does not know, the exporter logs and writes 18: what came is compared with what was asked."""
    monkeypatch.setattr("fused_ops.export.onnx.exporter.OPSETS", range(18, 27))
    with pytest.raises(ExportError, match=r"opset: torch\.onnx wrote .*, not the requested 26"):
        export_onnx(models.make("mlp"), (models.example(),), path, opset=26)
    assert not list(path.parent.iterdir())


def test_failed_export_leaves_an_existing_file(path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"torch\.export cannot trace"):
        export_onnx(Branch(), (models.example(),), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_bad_paths_are_refused_before_the_model_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.export.export", lambda *a, **k: pytest.fail("exported before checking the path"))
    for bad in (tmp_path, tmp_path / "missing" / "m.onnx", Path("/proc/m.onnx"), Path("/dev/null")):
        with pytest.raises(ExportError, match="export_onnx: path: got"):
            export_onnx(models.MLP(), (models.example(),), bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int8"}, ExportError, "precision: got 'int8', allowed: 'fp32', 'fp16', 'bf16'"),
        ({"model": "bert"}, TypeError, "model: got str"),
        ({"args": 3}, TypeError, "args: got int"),
        ({"metadata": {"a": 1}}, TypeError, "metadata: got 'a': 1"),
        ({"args": {"x": models.example()}, "dynamic_shapes": {"y": {0: "batch"}}}, ExportError, "dynamic_shapes: got 'y'"),
        ({"precision": "fp16", "keep_fp32": "norm"}, ExportError, "keep_fp32: got 'norm', allowed: a sequence"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str, path: Path) -> None:
    given: dict[str, Any] = {"model": models.MLP(), "args": (models.example(),)} | arguments
    with pytest.raises(error, match=message):
        export_onnx(given.pop("model"), given.pop("args"), path, **given)
    assert not path.exists()
