"""verify: finds what is wrong with a file, and nothing that is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from fused_ops import fused_softmax
from fused_ops.export import ExportError, export_onnx, export_torchscript, verify
from fused_ops.export.verification.verifier import compare
from tests.export import models
from tests.export.exports import Exports

pytestmark = pytest.mark.xdist_group("export-mlp")


@pytest.fixture
def mlp(exported: Exports) -> tuple[nn.Module, Path]:
    return exported("mlp")


def test_good_file(mlp: tuple[nn.Module, Path]) -> None:
    model, path = mlp
    report = verify(path, model, [models.example(1, 1), models.example(5, 9)])
    assert report.ok
    assert report.exit_status == 0
    assert [(row.example, row.output, row.shape) for row in report.rows] == [
        (0, "output", (1, 1, models.WIDTH)),
        (1, "output", (5, 9, models.WIDTH)),
    ]
    assert all(0 <= row.relative_error < 1e-5 and row.cosine > 0.999999 and row.max_abs < 1e-5 for row in report.rows)
    data = json.loads(json.dumps(report.as_dict()))
    assert data["ok"] is True
    assert data["runtime"] == "onnxruntime"


def test_one_example_as_tuple_dict_or_tensor(mlp: tuple[nn.Module, Path]) -> None:
    model, path = mlp
    x = models.example()
    for form in (x, (x,), {"x": x}, [x], [{"x": x}]):
        assert len(verify(path, model, form).rows) == 1


@pytest.mark.parametrize("change", ["weight", "bias"])
def test_wrong_weights_fail(mlp: tuple[nn.Module, Path], change: str, tmp_path: Path) -> None:
    model, path = mlp
    wrong = onnx.load(path)
    name = {"weight": "down.weight.T", "bias": "down.bias"}[change]
    weight = next(i for i in wrong.graph.initializer if i.name == name)
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] += 0.01
    weight.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    report = verify(tmp_path / "wrong.onnx", model, models.example())
    assert not report.ok
    assert report.exit_status == 1
    assert "relative error" in report.rows[0].reason
    assert "FAILED" in str(report)


def test_baked_dimension_fails_where_it_shows(exported: Exports) -> None:
    model, path = exported("mlp", dynamic=False)
    report = verify(path, model, [models.example(), models.example(3, 5)])
    assert [row.ok for row in report.rows] == [True, False]
    assert "onnxruntime refuses" in report.rows[1].reason
    assert report.exit_status == 1


def test_baked_dimension_that_still_runs(tmp_path: Path) -> None:
    """A trace that turned a size into a number runs at any shape, and is wrong."""

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1) / len(x[0])

    path = tmp_path / "mean.pt"
    with pytest.warns(torch.jit.TracerWarning):
        export_torchscript(Mean(), (models.example(2, 5),), path)
    assert verify(path, Mean(), models.example(2, 5)).ok
    assert not verify(path, Mean(), models.example(2, 6)).ok


def test_nan_and_infinity_positions(tmp_path: Path) -> None:
    class Softmax(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused_softmax(x)

    x = torch.randn(4, 8)
    x[1] = -math.inf
    x[2, 3] = math.nan
    export_onnx(Softmax(), (x,), tmp_path / "softmax.onnx")
    report = verify(tmp_path / "softmax.onnx", Softmax(), x)
    assert report.ok, str(report)
    assert report.rows[0].nan_mismatches == 0


@pytest.mark.parametrize(
    ("got", "expected", "mismatches"),
    [
        ([1.0, math.nan], [1.0, 2.0], 1),
        ([1.0, 2.0], [1.0, math.nan], 1),
        ([1.0, math.inf], [1.0, -math.inf], 1),
        ([1.0, math.inf], [1.0, math.nan], 1),
        ([1.0, -math.inf], [1.0, 2.0], 1),
        ([1.0, 2.0], [1.0, math.inf], 1),
        ([math.nan, math.inf], [math.nan, math.inf], 0),
    ],
)
def test_compare_counts_mismatches(got: list[float], expected: list[float], mismatches: int) -> None:
    row = compare(np.array(got), np.array(expected), 0, "", "y", 1e-4, 0.999)
    assert row.nan_mismatches == mismatches
    assert row.ok is (mismatches == 0)


@pytest.mark.parametrize(
    ("got", "expected", "ok"),
    [
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 1e-9], [0.0, 0.0], False),
        ([1.0, 2.0], [1.0, 2.0002], True),
        ([1.0, 2.0], [1.0, 2.0005], False),
        ([-1.0, -2.0], [1.0, 2.0], False),
        ([], [], True),
    ],
)
def test_compare_bounds(got: list[float], expected: list[float], ok: bool) -> None:
    row = compare(np.array(got), np.array(expected), 0, "", "y", 1.5e-4, 0.999)
    assert row.ok is ok, row


def test_compare_values() -> None:
    row = compare(np.array([3.0, 4.5]), np.array([3.0, 4.0]), 0, "", "y", 1.0, 0.0)
    assert row.max_abs == 0.5
    assert row.relative_error == 0.125
    assert row.cosine == pytest.approx(27 / (math.hypot(3, 4.5) * 5))
    assert not compare(np.zeros((2, 1)), np.zeros((1, 2)), 0, "", "y", 1.0, 0.0).ok


def test_bounds_can_be_given(mlp: tuple[nn.Module, Path]) -> None:
    model, path = mlp
    assert not verify(path, model, models.example(), max_relative_error=0.0, min_cosine=1.0).ok
    report = verify(path, model, models.example(), max_relative_error=0.0)
    assert not report.ok
    assert report.max_relative_error == 0.0


def test_reference_runtime_agrees(mlp: tuple[nn.Module, Path]) -> None:
    model, path = mlp
    report = verify(path, model, models.example(), runtime="reference")
    assert report.runtime == "reference"
    assert report.ok


def test_bf16_is_rounded_after_every_operation(tmp_path: Path) -> None:
    """ONNX Runtime has no bf16 products on the CPU; the stand-in must round, or it would say nothing about bf16."""

    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ torch.eye(4) + 256.0) - 256.0

    x = torch.tensor([[0.3, 0.6, 1.0, 3.0]])
    export_onnx(Steps(), (x,), tmp_path / "steps.onnx", precision="bf16")
    report = verify(tmp_path / "steps.onnx", Steps(), x, max_relative_error=1.0)
    assert report.runtime == "onnxruntime, fp32 rounded to bf16"
    steps = x.bfloat16().float() + 256.0
    wrong = (steps.bfloat16() - 256.0).float()  # bf16 holds 256 and 258, and nothing between
    assert report.rows[0].max_abs == pytest.approx((wrong - x).abs().max().item(), rel=1e-5)
    assert report.rows[0].max_abs > 0.5
    reference = verify(tmp_path / "steps.onnx", Steps(), x, max_relative_error=1.0, runtime="reference")
    assert reference.rows[0].max_abs == report.rows[0].max_abs


def test_table_shows_the_reason(mlp: tuple[nn.Module, Path]) -> None:
    from rich.console import Console

    model, path = mlp
    console = Console(width=200, record=True)
    console.print(verify(path, model, models.example(), max_relative_error=0.0))
    text = console.export_text()
    assert "FAILED" in text
    assert "relative error" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.onnx", None, "path: got"),
        ("empty.onnx", b"", "0 bytes"),
        ("noise.onnx", b"\xff\xfe not onnx" * 50, "no ONNX file"),
        ("model.bin", b"x", "ends in .onnx"),
        ("noise.pt", b"not a zip archive", "no TorchScript file"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExportError, match=message):
        verify(tmp_path / name, models.MLP(), models.example())


def test_truncated_file(mlp: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = mlp
    data = path.read_bytes()
    for keep in (1, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.onnx").write_bytes(data[:keep])
        with pytest.raises(ExportError, match="verify: "):
            verify(tmp_path / "cut.onnx", model, models.example())


def test_inputs_that_do_not_fit(mlp: tuple[nn.Module, Path]) -> None:
    class Two(nn.Module):
        def forward(self, a: Any, b: Any) -> Any:
            return a

    with pytest.raises(ExportError, match="inputs: got 2 tensors, allowed: one for each of x"):
        verify(mlp[1], Two(), (models.example(), models.example()))
    with pytest.raises(ExportError, match="inputs: got an empty list"):
        verify(mlp[1], Two(), [])
    with pytest.raises(ExportError, match="gives 1 outputs, the model 2"):
        verify(mlp[1], models.DirectCalls().eval(), models.example())
