"""Which data a quantisation is calibrated on and measured on, and how many scales a weight has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from fused_ops.export import quantize_onnx, sensitivity
from fused_ops.export.cli import app
from tests.export.onnx_files import linear_model, save

WIDTH, COLUMNS = 16, 8  # of linear_model's weight
LARGE = 50.0  # times the calibration data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(linear_model(), tmp_path / "linear.onnx")


def batches(scale: float, number: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": (scale * rng.uniform(-1, 1, (2, 4, WIDTH))).astype(np.float32)} for _ in range(number)]


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_scale_a_column_or_one_a_weight(per_channel: bool, path: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_onnx(path, out, batches(1.0), per_channel=per_channel, progress=False)
    graph = onnx.load(out).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in arrays]
    assert [arrays[n.input[1]].size for n in weights] == [COLUMNS if per_channel else 1]


def test_the_result_is_measured_on_the_data_given_for_it(path: Path, tmp_path: Path) -> None:
    """Data far beyond the calibrated range is clipped, and that shows."""
    alike, beyond = (
        quantize_onnx(path, tmp_path / "int8.onnx", batches(1.0), evaluation=evaluation, progress=False)
        for evaluation in (batches(1.0), [{"x": np.eye(WIDTH, dtype=np.float32)[None] * LARGE + 1.0}])
    )
    assert beyond.cosine_mean < 0.99 < alike.cosine_mean
    assert sensitivity(path, batches(1.0), evaluation=batches(1.0), progress=False).rows[0].cosine_mean > 0.99


@pytest.mark.parametrize(("held_out", "seen"), [("0.25", False), ("0", True)])
def test_what_the_command_holds_out_is_not_calibrated_on(
    held_out: str, seen: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of four batches is larger than the others: the range is its own only where it is not held out."""
    monkeypatch.chdir(tmp_path)
    arguments = ["quantize", path.name, "-o", "int8.onnx", "--json", "--held-out", held_out]
    for i, batch in enumerate([*batches(1.0), *batches(LARGE, 1)]):
        np.savez(f"batch{i}.npz", **batch)
        arguments += ["--calibration", f"batch{i}.npz"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    ((_, high),) = json.loads(result.stdout)["ranges"].values()
    assert (high > 1.0) is seen
