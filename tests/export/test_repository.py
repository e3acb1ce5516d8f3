"""Model repositories: the layout, config.pbtxt by the server's own schema, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from fused_ops.export import ExportError, export_model_repository
from fused_ops.export.files.manifest import write_manifest
from tests.export.onnx_files import linear_model, save

pytest.importorskip("tritonclient")
text_format = pytest.importorskip("google.protobuf.text_format")
from fused_ops.export.repository.server_config import schema, validated  # noqa: E402


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(linear_model(), tmp_path / "linear.onnx")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def parsed(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema().ModelConfig())


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def plan(tmp_path: Path, kind: str = "tensorrt") -> Path:
    """A file with the manifest that build_engine writes; the server runs it, not we."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    write_manifest(
        path,
        kind,
        inputs=[{"name": "x", "dtype": "FLOAT16", "dims": ["batch", 16]}],
        outputs=[{"name": "y", "dtype": "FLOAT16", "dims": ["batch"]}],
        profiles=[{"x": [[1, 16], [4, 16], [8, 16]]}],
    )
    return path


def test_onnx_with_dynamic_batching(model: Path, root: Path) -> None:
    folder = export_model_repository(
        root, "linear", model, max_batch_size=32, preferred_batch_sizes=[8, 16], max_queue_delay_us=200, instances=2,
        kind="gpu", gpus=[0, 1],
    )  # fmt: skip
    assert files(root) == ["linear/1/model.onnx", "linear/1/model.onnx.manifest.json", "linear/config.pbtxt"]
    assert (folder / "1" / "model.onnx").read_bytes() == model.read_bytes()
    config = parsed(folder)
    assert (config.name, config.backend, config.default_model_filename, config.max_batch_size) == (
        "linear", "onnxruntime", "model.onnx", 32,
    )  # fmt: skip
    assert [(port.name, port.data_type, list(port.dims)) for port in config.input] == [("x", schema().TYPE_FP32, [-1, 16])]
    assert [(port.name, list(port.dims)) for port in config.output] == [("y", [-1, 8])]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 200
    group = config.instance_group[0]
    assert (group.count, list(group.gpus), group.kind) == (2, [0, 1], group.KIND_GPU)


def test_without_batching_the_dims_are_whole(model: Path, root: Path) -> None:
    config = parsed(export_model_repository(root, "linear", model))
    assert [list(port.dims) for port in (*config.input, *config.output)] == [[-1, -1, 16], [-1, -1, 8]]
    assert not config.HasField("dynamic_batching")
    assert config.instance_group[0].kind == config.instance_group[0].KIND_AUTO


def test_external_data_comes_along(tmp_path: Path, root: Path) -> None:
    onnx.save(linear_model(), tmp_path / "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    export_model_repository(root, "big", tmp_path / "big.onnx")
    assert "big/1/weights.bin" in files(root)
    onnx.checker.check_model(str(root / "big" / "1" / "model.onnx"))


def test_a_tensorrt_plan_by_its_manifest(tmp_path: Path, root: Path) -> None:
    folder = export_model_repository(root, "engine", plan(tmp_path), max_batch_size=8)
    config = parsed(folder)
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert [(port.name, port.data_type, list(port.dims)) for port in config.input] == [("x", schema().TYPE_FP16, [16])]
    assert list(config.output[0].dims) == [1]  # a scalar a request: the server has no empty shape
    assert config.output[0].HasField("reshape")
    assert not config.output[0].reshape.shape
    manifest = json.loads((folder / "1" / "model.plan.manifest.json").read_text())
    assert manifest["profiles"] == [{"x": [[1, 16], [4, 16], [8, 16]]}]


def test_torchscript(tmp_path: Path, root: Path) -> None:
    torch.jit.trace(torch.nn.Linear(4, 2), torch.ones(1, 4)).save(str(tmp_path / "m.pt"))
    ports = {"inputs": {"INPUT__0": ("FLOAT", [-1, 4])}, "outputs": {"OUTPUT__0": ("FLOAT", [-1, 2])}}
    config = parsed(export_model_repository(root, "script", tmp_path / "m.pt", max_batch_size=4, **ports))
    assert (config.backend, config.default_model_filename) == ("pytorch", "model.pt")
    assert list(config.output[0].dims) == [2]
    for change, message in (
        ({"inputs": None}, "inputs, outputs: got none"),
        ({"inputs": {"x": ("FLOAT", [4])}}, r"inputs: got 'x', allowed: '<anything>__<position>', or input"),
        ({"outputs": {"y": ("FLOAT", [2])}}, r"outputs: got 'y', allowed: '<anything>__<position>'"),
        ({"inputs": ports["inputs"] | {"INPUT__1": ("FLOAT", [4])}}, "inputs: got 2, allowed: 1, forward's input"),
        ({"inputs": {"INPUT__0": ("float32", [-1, 4])}}, "INPUT__0: dtype: got 'float32', allowed: FLOAT"),
    ):
        with pytest.raises(ExportError, match=message):
            export_model_repository(root, "other", tmp_path / "m.pt", **(ports | change))


def test_versions_are_added_and_never_replaced(model: Path, root: Path, tmp_path: Path) -> None:
    export_model_repository(root, "linear", model)
    export_model_repository(root, "linear", model, version=2)
    before = files(root)
    assert [name for name in before if name.endswith(".onnx")] == ["linear/1/model.onnx", "linear/2/model.onnx"]
    with pytest.raises(ExportError, match=r"version: got 2, which .* has already"):
        export_model_repository(root, "linear", model, version=2)
    with pytest.raises(ExportError, match=r"got another config.pbtxt"):
        export_model_repository(root, "linear", model, version=3, max_batch_size=4)
    assert files(root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear.onnx", "repository"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "../up"}, r"name: got '../up', allowed: letters"),
    "hidden": ({"name": ".hidden"}, r"name: got"),
    "version": ({"version": 0}, "version: got 0, allowed: 1 or more"),
    "preferred": ({"max_batch_size": 4, "preferred_batch_sizes": [8]}, "preferred_batch_sizes: got 8, allowed: 1 to max"),
    "no batching": ({"preferred_batch_sizes": [8]}, "allowed: with max_batch_size above 0"),
    "negative": ({"max_batch_size": -1}, "got -1, 0, allowed: 0 or more"),
    "instances": ({"instances": 0}, "instances: got 0"),
    "kind": ({"kind": "tpu"}, "kind: got 'tpu', allowed: 'auto', 'gpu', 'cpu'"),
    "gpus": ({"kind": "cpu", "gpus": [0]}, r"gpus: got \[0\] with kind 'cpu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_leave_no_trace(model: Path, root: Path, case: str) -> None:
    options, message = dict(REFUSED[case][0]), REFUSED[case][1]
    with pytest.raises(ExportError, match=message):
        export_model_repository(root, options.pop("name", "linear"), model, **options)
    assert not root.exists()


def test_a_fixed_first_dimension_is_no_batch(tmp_path: Path, root: Path) -> None:
    with pytest.raises(
        ExportError, match=r"max_batch_size: got 8, allowed: 0, because dimension 0 is no batch in x\[4, -1, 16\]"
    ):
        export_model_repository(root, "m", save(linear_model(batch=4), tmp_path / "m.onnx"), max_batch_size=8)


def test_what_the_server_cannot_run_is_refused(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ExportError, match="got an engine of 'tensorrt_rtx', allowed: of 'tensorrt'"):
        export_model_repository(root, "m", plan(tmp_path, "tensorrt_rtx"))
    path = plan(tmp_path)
    with pytest.raises(ExportError, match="max_batch_size: got 9, allowed: at most 8, the profile's maximum of 'x'"):
        export_model_repository(root, "m", path, max_batch_size=9)
    with pytest.raises(ExportError, match="kind: got 'cpu', allowed: 'gpu' or 'auto' for a TensorRT engine"):
        export_model_repository(root, "m", path, kind="cpu")
    path.with_name("model.engine.manifest.json").unlink()
    with pytest.raises(ExportError, match="has no manifest beside it"):
        export_model_repository(root, "m", path)
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"artefact: got 'm\.bin', allowed: a file that ends in \.onnx"):
        export_model_repository(root, "m", tmp_path / "m.bin")


def test_the_schema_refuses_what_the_server_does_not_know() -> None:
    """That the check in validated() can fail."""
    with pytest.raises(text_format.ParseError):
        text_format.Parse('name: "m" max_batchsize: 8', schema().ModelConfig())
    assert validated(schema().ModelConfig(name="m")) == 'name: "m"\n'
