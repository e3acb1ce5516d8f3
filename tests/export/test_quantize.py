"""quantize_onnx and sensitivity: what is quantised, methods that differ, accuracy on sentences not calibrated on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fused_ops.export import ExportError, build_engine, export_onnx, quantize_onnx, sensitivity, verify
from tests.export import models, sentences

pytestmark = pytest.mark.xdist_group("export-tails")


class Tails(nn.Module):
    """Two linears in a row with a residual; the second one's input has outliers, so that INT8 costs it more."""

    def __init__(self) -> None:
        super().__init__()
        self.mild = nn.Linear(16, 16)
        self.wild = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + torch.tanh(self.mild(x))
        return hidden + self.wild(hidden**3)


@pytest.fixture(scope="module")
def tails(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model, path = Tails().eval(), tmp_path_factory.mktemp("tails") / "tails.onnx"
    export_onnx(model, (torch.randn(2, 3, 16),), path, dynamic_shapes=models.DYNAMIC)
    return model, path


def batches(seed: int, lengths: tuple[int, ...] = (3, 17, 1, 64, 8)) -> list[dict[str, torch.Tensor]]:
    """Batches of unequal length: asarray of a list of them is what crashes onnxruntime's own calibrators."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(2, length, 16, generator=generator)} for length in lengths]


def test_graph(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = tails
    out = tmp_path / "int8.onnx"
    report = quantize_onnx(path, out, batches(0), evaluation=batches(1), progress=False)
    assert report.quantized == ["mild/MatMul", "wild/MatMul"]
    assert report.kept == []
    assert 0.8 < report.cosine_min <= report.cosine_mean < 1
    assert json.loads(json.dumps(report.as_dict()))["method"] == "minmax"
    graph = onnx.load(out).graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {i.name: i for i in graph.initializer}
    for node in graph.node:
        from_dq = [makers[name].op_type == "DequantizeLinear" for name in node.input if name in makers]
        if node.op_type == "MatMul":
            assert from_dq == [True, True], "both the input and the weight"
        elif node.op_type != "DequantizeLinear":
            assert not any(from_dq), f"{node.name}: the residual connection must stay fp32"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) == 3:
            assert not np.any(onnx.numpy_helper.to_array(weights[node.input[2]])), "TensorRT wants zero points of zero"
    assert sum(i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 2 for i in graph.initializer) == 2
    assert "Identity" not in {node.op_type for node in graph.node}
    assert verify(out, model, batches(2)[3]["x"], min_cosine=0.95).ok


def test_calibration_methods_give_different_files(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """With 128 bins for 128 levels onnxruntime's entropy equals its minmax byte for byte."""
    files, ranges = {}, {}
    for method in ("minmax", "percentile", "entropy"):
        report = quantize_onnx(
            tails[1], tmp_path / f"{method}.onnx", batches(0), method=method, bins=512, percentile=99.0, progress=False
        )
        files[method], ranges[method] = (tmp_path / f"{method}.onnx").read_bytes(), report.ranges
    assert len(set(files.values())) == 3
    for name, (low, high) in ranges["minmax"].items():
        for method in ("percentile", "entropy"):
            assert low <= ranges[method][name][0] < ranges[method][name][1] <= high
    assert len({json.dumps(r, sort_keys=True) for r in ranges.values()}) == 3


def test_bins_change_the_entropy_range(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    ranges = [
        quantize_onnx(tails[1], tmp_path / "q.onnx", batches(0), method="entropy", bins=bins, progress=False).ranges
        for bins in (256, 1024)
    ]
    assert ranges[0] != ranges[1]
    with pytest.raises(ExportError, match="bins: got 128 for 128 quantized_bins"):
        quantize_onnx(tails[1], tmp_path / "none.onnx", batches(0), method="entropy", bins=128, progress=False)
    assert not (tmp_path / "none.onnx").exists()


def test_minmax_is_the_extremes(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    data = batches(0)
    report = quantize_onnx(tails[1], tmp_path / "q.onnx", data, include=["mild"], progress=False)
    values = torch.cat([batch["x"].flatten() for batch in data])
    assert report.ranges == {"x": (values.min().item(), values.max().item())}


def test_include_and_exclude(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    report = quantize_onnx(tails[1], out, batches(0), exclude=["wild"], progress=False)
    assert (report.quantized, report.kept) == (["mild/MatMul"], ["wild/MatMul"])
    assert quantize_onnx(tails[1], out, batches(0), include=["m*/MatMul"], progress=False).quantized == ["mild/MatMul"]
    for arguments in ({"include": ["nothing"]}, {"exclude": ["nothing"]}, {"include": "mild"}):
        with pytest.raises(ExportError, match=r"(in|ex)clude: got"):
            quantize_onnx(tails[1], tmp_path / "none.onnx", batches(0), progress=False, **arguments)
    with pytest.raises(ExportError, match="no linear is left to quantise of 2"):
        quantize_onnx(tails[1], tmp_path / "none.onnx", batches(0), exclude=["*"], progress=False)
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "max"}, "method: got 'max', allowed: 'minmax', 'percentile', 'entropy'"),
        ({"percentile": 101}, "percentile: got 101"),
        ({"calibration": []}, "calibration: got no batches"),
        ({"calibration": [{"y": torch.ones(1)}]}, r"calibration: got \['y'\], allowed: dicts with the inputs x"),
        ({"calibration": [torch.ones(1)]}, "calibration: got Tensor"),
        ({"calibration": [{"x": torch.ones(1, 1, 7)}]}, r"ONNX Runtime refuses the batch x \[1, 1, 7\] float32"),
        ({"evaluation": []}, "evaluation: got no batches"),
        ({"path": "missing.onnx"}, "path: got 'missing.onnx'"),
        ({"out": "missing/q.onnx"}, "path: got"),
    ],
)
def test_bad_arguments(tails: tuple[nn.Module, Path], tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"path": tails[1], "calibration": batches(0), "out": "q.onnx"} | arguments
    with pytest.raises(ExportError, match=message):
        quantize_onnx(given.pop("path"), tmp_path / given.pop("out"), given.pop("calibration"), progress=False, **given)
    assert not list(tmp_path.iterdir())


def test_model_beyond_protobuf_is_refused(
    tails: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "external.onnx"
    export_onnx(tails[0], (torch.randn(2, 3, 16),), path, dynamic_shapes=models.DYNAMIC, external_data_bytes=100)
    monkeypatch.setattr("fused_ops.export.quantize.quantizer.MAX_BYTES", path.stat().st_size + 1000)
    with pytest.raises(ExportError, match="path: got a model of"):
        quantize_onnx(path, tmp_path / "q.onnx", batches(0), progress=False)
    monkeypatch.setattr("fused_ops.export.quantize.quantizer.MAX_BYTES", path.stat().st_size + 10_000)
    quantize_onnx(path, tmp_path / "q.onnx", batches(0), progress=False)
    assert verify(tmp_path / "q.onnx", tails[0], torch.randn(2, 3, 16), min_cosine=0.9).ok


def test_shared_weight_stays_fp32_for_others(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.weight * x.sum()

    path, out = tmp_path / "tied.onnx", tmp_path / "q.onnx"
    export_onnx(Tied().eval(), (torch.randn(16, 16),), path)
    report = quantize_onnx(path, out, [{"x": torch.randn(16, 16)}], progress=False)
    assert report.quantized == ["MatMul"]
    graph = onnx.load(out).graph
    quantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    readers = [node.name for node in graph.node if set(node.input) & quantised]
    assert readers == report.quantized


def test_half_precision_file_is_refused(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    export_onnx(tails[0], (torch.randn(2, 3, 16),), tmp_path / "half.onnx", precision="fp16")
    with pytest.raises(ExportError, match="path: got linears that are not fp32"):
        quantize_onnx(tmp_path / "half.onnx", tmp_path / "q.onnx", batches(0), progress=False)


@pytest.mark.parametrize(("precision", "kind"), [("int8", onnx.TensorProto.INT8), ("fp8", onnx.TensorProto.FLOAT8E4M3FN)])
def test_modelopt(tails: tuple[nn.Module, Path], tmp_path: Path, precision: str, kind: int) -> None:
    pytest.importorskip("modelopt.onnx.quantization", reason="needs nvidia-modelopt")
    out = tmp_path / "q.onnx"
    report = quantize_onnx(
        tails[1],
        out,
        batches(0),
        precision=precision,
        backend="modelopt",
        exclude=["wild"],
        evaluation=batches(1),
        progress=False,
    )
    assert report.quantized == ["mild/MatMul"]
    assert report.cosine_min > 0.95
    graph = onnx.load(out).graph
    assert [n.op_type for n in graph.node].count("DequantizeLinear") == 2
    zeros = [i for i in graph.initializer if i.data_type == kind]
    assert len(zeros) == 2
    assert not [p for p in tmp_path.iterdir() if p.name not in ("q.onnx", "q.onnx.manifest.json")]


def test_modelopt_missing_or_wrong(tails: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fused-ops\[modelopt\]'"):
        quantize_onnx(tails[1], tmp_path / "q.onnx", batches(0), precision="fp8", backend="modelopt", progress=False)
    for arguments in ({"precision": "fp8"}, {"precision": "int4"}, {"backend": "tensorrt"}):
        with pytest.raises(ExportError, match=r"(precision|backend): got"):
            quantize_onnx(tails[1], tmp_path / "q.onnx", batches(0), progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_sensitivity_finds_the_harmful_linear(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    report = sensitivity(tails[1], batches(0), evaluation=batches(1), progress=False)
    assert [row.node for row in report.rows] == ["wild/MatMul", "mild/MatMul"]
    assert report.rows[0].cosine_mean < report.rows[1].cosine_mean < 1
    assert report.propose_exclude(0.0) == []
    assert report.propose_exclude(1.0) == ["wild/MatMul", "mild/MatMul"]
    loss = 1 - report.rows[1].cosine_mean
    assert report.propose_exclude(1 - 1.5 * loss) == ["wild/MatMul"]
    everything = quantize_onnx(tails[1], tmp_path / "a.onnx", batches(0), evaluation=batches(2), progress=False)
    proposal = quantize_onnx(
        tails[1], tmp_path / "b.onnx", batches(0), exclude=["wild/MatMul"], evaluation=batches(2), progress=False
    )
    assert proposal.cosine_mean > everything.cosine_mean


def test_progress_is_drawn(tails: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.progress

    steps: list[int] = []
    monkeypatch.setattr(rich.progress.Progress, "advance", lambda self, task, advance=1: steps.append(task))
    quantize_onnx(tails[1], tmp_path / "q.onnx", batches(0))
    assert len(steps) == 5


def feeds(lines: list[str]) -> list[dict[str, np.ndarray]]:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(models.minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = [tokenizer.encode(line) for line in lines]
    return [{"input_ids": np.array([e.ids]), "attention_mask": np.array([e.attention_mask])} for e in encoded]


def embedding(outputs: list[np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Mean over the tokens, as sentence-transformers pools MiniLM."""
    mask = inputs["attention_mask"][..., None]
    return (outputs[0] * mask).sum(1) / mask.sum(1)


def test_int8_on_held_out_batches_and_its_engine(tails: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """What test_minilm_int8 measures, on the small model: a metric of one's own, percentile, exclude, and an engine."""
    seen: list[int] = []

    def mean(outputs: list[np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
        seen.append(inputs["x"].shape[1])
        return outputs[0].mean(1)

    out = tmp_path / "int8.onnx"
    report = quantize_onnx(
        tails[1], out, batches(0), method="percentile", exclude=["w*d"], evaluation=batches(1), metric=mean, progress=False
    )
    assert (report.quantized, report.kept) == (["mild/MatMul"], ["wild/MatMul"])
    assert report.cosine_mean >= 0.985, report.cosine_mean
    assert set(seen) == {batch["x"].shape[1] for batch in batches(1)}
    pytest.importorskip("tensorrt_rtx", reason="the engine needs tensorrt_rtx")
    profile = {"x": ((1, 1, 16), (2, 8, 16), (2, 64, 16))}
    build_engine(out, tmp_path / "int8.engine", backend="tensorrt_rtx", profiles=profile, progress=False)
    assert (tmp_path / "int8.engine").stat().st_size > 1000


@pytest.mark.slow
def test_minilm_int8(tmp_path: Path) -> None:
    """The contract: a mean cosine of at least 0.985 to fp32 on sentences that were not calibrated on; its engine builds."""
    assert not set(sentences.CALIBRATION) & set(sentences.HELD_OUT)
    path, out = tmp_path / "minilm.onnx", tmp_path / "int8.onnx"
    export_onnx(models.minilm(), models.bert_example(2, 16), path, dynamic_shapes=models.BERT_SHAPES)
    report = quantize_onnx(
        path, out, feeds(sentences.CALIBRATION), method="percentile", exclude=["encoder.layer.*.output.dense"],
        evaluation=feeds(sentences.HELD_OUT), metric=embedding, progress=False,
    )  # fmt: skip
    assert len(report.quantized) == 31
    assert report.kept == [f"encoder.layer.{i}.output.dense/MatMul" for i in range(6)]
    assert report.cosine_mean >= 0.985, report.cosine_mean
    assert out.stat().st_size < 0.8 * path.stat().st_size
    pytest.importorskip("tensorrt_rtx", reason="the engine needs tensorrt_rtx")
    profile = dict.fromkeys(models.BERT_SHAPES, ((1, 8), (4, 32), (8, 128)))
    build_engine(out, tmp_path / "int8.engine", backend="tensorrt_rtx", profiles=profile, progress=False)
    assert (tmp_path / "int8.engine").stat().st_size > 10e6
