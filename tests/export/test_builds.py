"""Models of the field, fused and unfused, fp32 to bf16, dynamic and static: what export_onnx writes, TensorRT-RTX builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fused_ops import fuse
from fused_ops.export import build_engine, export_onnx
from tests.export import models
from tests.export.exports import NAMES, Exports, grouped

pytest.importorskip("tensorrt_rtx")
WIDTH = models.WIDTH
PROFILES = [
    {"x": ((1, 1, WIDTH), (2, 8, WIDTH), (8, 64, WIDTH))},
    {"x": ((1, 65, WIDTH), (1, 128, WIDTH), (2, 512, WIDTH))},
]
CASES = [
    grouped(name, fused, precision)
    for name in ("mlp", "decoder", "vit")
    for fused in (True, False)
    for precision in ("fp32", "fp16")
]


@pytest.mark.parametrize(("name", "fused", "precision"), [*CASES, grouped("mlp", True, "bf16")])
def test_dynamic_shapes_build_under_two_profiles(
    name: str, fused: bool, precision: str, exported: Exports, tmp_path: Path
) -> None:
    """TensorRT's parser and builder take the file, casts and named dimensions included; no engine runs without a GPU."""
    _, path = exported(name, fused, precision=precision)
    report = build_engine(path, tmp_path / "model.engine", backend="tensorrt_rtx", profiles=PROFILES, progress=False)
    assert report.bytes > path.stat().st_size / 2
    assert (tmp_path / "model.engine").stat().st_size > 1000
    assert [tensor["dims"] for tensor in report.manifest["inputs"]] == [["batch", "sequence", WIDTH]]
    assert len(report.manifest["profiles"]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_static_shapes_need_no_profile(name: str, exported: Exports, tmp_path: Path) -> None:
    _, path = exported(name, dynamic=False)
    report = build_engine(path, tmp_path / "model.engine", backend="tensorrt_rtx", progress=False)
    assert report.manifest["inputs"][0]["dims"] == [2, 5, WIDTH]
    assert report.manifest["profiles"] == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_minilm_fused(precision: str, tmp_path: Path) -> None:
    model: Any = models.minilm()
    assert fuse(model).fused
    path = tmp_path / "minilm.onnx"
    export_onnx(model, models.bert_example(2, 16), path, dynamic_shapes=models.BERT_SHAPES, precision=precision)
    ranges = ((1, 1), (8, 32), (32, 128))
    profile = {"input_ids": ranges, "attention_mask": ranges}
    report = build_engine(path, tmp_path / "minilm.engine", backend="tensorrt_rtx", profiles=profile, progress=False)
    assert report.bytes > path.stat().st_size * 0.9  # the weights are in it
