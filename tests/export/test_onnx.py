"""export_onnx: right results at other shapes, standard operators, and each trap met before."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim

from fused_ops import REGISTRY, fused_linear, fused_softmax
from fused_ops.export import ExportError, custom_translation_table, export_onnx, export_submodule, verify
from tests.export import models
from tests.export.exports import NAMES, Exports
from tests.export.onnx_helpers import SHAPES, dims, operators


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", NAMES)
def test_dynamic_fp32(name: str, fused: bool, exported: Exports) -> None:
    model, path = exported(name, fused)
    report = verify(path, model, SHAPES, max_relative_error=2e-6)
    assert report.ok, str(report)
    assert len(report.rows) == len(SHAPES)
    loaded = onnx.load(path)
    assert {node.domain for node in loaded.graph.node} == {""}
    assert {o.domain: o.version for o in loaded.opset_import} == {"": 20}
    assert operators(loaded)["LayerNormalization"] == (1 if name == "mlp" else 2)
    assert operators(loaded)["Gelu"] == 1
    assert operators(loaded)["Softmax"] == (0 if name == "mlp" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_static(name: str, exported: Exports) -> None:
    model, path = exported(name, dynamic=False)
    assert dims(onnx.load(path).graph.input[0]) == [2, 5, models.WIDTH]
    assert verify(path, model, models.example(), max_relative_error=2e-6).ok


def test_opset_23_has_rms_normalization_and_20_primitives(path: Path) -> None:
    model = models.RMS().eval()
    for opset, count in ((20, 0), (23, 1)):
        export_onnx(model, (models.example(),), path, dynamic_shapes=models.DYNAMIC, opset=opset)
        assert operators(onnx.load(path))["RMSNormalization"] == count
        assert onnx.load(path).opset_import[0].version == opset
        assert verify(path, model, SHAPES, max_relative_error=2e-6).ok


def test_attention_as_primitives_or_one_operator(path: Path) -> None:
    """torch writes Attention from opset 23, which hides the softmax from keep_fp32: only on request."""

    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            attention = nn.functional.scaled_dot_product_attention
            return attention(q, k, v) + attention(q, k, v, attn_mask=mask) + attention(q, k, v, is_causal=True)

    args = (*(torch.randn(1, 2, 5, 8) for _ in range(3)), torch.rand(1, 1, 5, 5) > 0.3)
    program = torch.export.export(Attend(), args)
    for opset, one in ((20, False), (23, False), (23, True), (25, False)):
        export_onnx(program, (), path, opset=opset, precision="fp16", attention_operator=one)
        counts = operators(onnx.load(path))
        assert (counts["Attention"], counts["Softmax"]) == ((3, 0) if one else (0, 3))
        assert verify(path, Attend(), args).ok
    with pytest.raises(ExportError, match="attention_operator: got True at opset 20"):
        export_onnx(Attend(), args, path, attention_operator=True)


def test_metadata_reaches_onnx_runtime(path: Path) -> None:
    export_onnx(nn.Linear(4, 2), (torch.ones(3, 4),), path, metadata={"owner": "me"}, precision="fp16")
    found = ort.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert found["owner"] == "me"
    assert found["fused_ops.precision"] == "fp16"
    assert found["fused_ops.keep_fp32"] == "norm,softmax"
    assert found["torch.version"] == torch.__version__


@pytest.mark.xdist_group("export-decoder")
def test_shapes_are_inferred_for_every_value(exported: Exports) -> None:
    graph = onnx.load(exported("decoder", precision="fp16")[1]).graph
    known = {v.name: v for v in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in node.output:
            assert name in known
            assert known[name].type.tensor_type.HasField("shape"), name


def test_external_data(path: Path) -> None:
    model = nn.Linear(models.WIDTH, 3 * models.WIDTH)
    export_onnx(model, (models.example(),), path, dynamic_shapes=models.DYNAMIC, external_data_bytes=1000)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data", "model.onnx.manifest.json"]
    assert path.stat().st_size < (path.parent / "model.onnx.data").stat().st_size
    assert verify(path, model, SHAPES, max_relative_error=2e-6).ok


def test_training_mode_is_left_as_it_was(path: Path) -> None:
    model = nn.Sequential(nn.Linear(models.WIDTH, 8), nn.Dropout(0.9), nn.Dropout(0.9))
    model.train()
    model[1].eval()
    export_onnx(model, (models.example(),), path)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert "Dropout" not in operators(onnx.load(path))
    assert verify(path, model, models.example()).ok


def test_exported_program(path: Path, tmp_path: Path) -> None:
    """A saved ExportedProgram is what the command line takes instead of a pickled module."""
    model = nn.Linear(models.WIDTH, 8)
    program = torch.export.export(model, (models.example(),), dynamic_shapes=({0: Dim("batch"), 1: Dim("sequence")},))
    export_onnx(program, (), path, dynamic_shapes=models.DYNAMIC)
    assert dims(onnx.load(path).graph.input[0])[:2] == ["batch", "sequence"]
    assert verify(path, model, SHAPES).ok


ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2")


class Table(nn.Module):
    """Every activation, every result of the norm, with and without its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(models.WIDTH, 24)
        self.weight = nn.Parameter(torch.randn(models.WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, mean, rstd = torch.ops.fused_ops.layer_norm_fwd(x, self.weight, None, 1e-5)
        normalised = torch.ops.fused_ops.layer_norm_fwd(x, None, None, 1e-5)[0]
        outputs = [fused_linear(y, self.up.weight, self.up.bias, activation) for activation in ACTIVATIONS]
        return (*outputs, fused_softmax(normalised, dim=1), mean, rstd)


@pytest.mark.parametrize("opset", [18, 20, 24])
def test_translation_table(opset: int, path: Path) -> None:
    """For those who call torch.onnx themselves. 24 has no name in onnxscript; all three results of the norm are right."""
    model = Table().eval()
    program = torch.onnx.export(
        model, (models.example(),), dynamo=True, opset_version=opset, verbose=False,
        dynamic_shapes=({0: Dim("batch"), 1: Dim("sequence")},), custom_translation_table=custom_translation_table(opset),
    )  # fmt: skip
    program.save(path)
    exported = onnx.load(path)
    assert {o.domain: o.version for o in exported.opset_import} == {"": opset}
    assert operators(exported)["LayerNormalization"] == 2
    assert "Concat" not in operators(exported), "LayerNormalization's three results taken for one"
    report = verify(path, model, SHAPES, max_relative_error=1e-5)
    assert report.ok, str(report)


def test_translation_table_casts_softmax() -> None:
    """Never to a narrower dtype before it: from fp16 to fp32 and to bf16, and from fp32 to fp16, it computes in fp32."""

    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            widened, across = fused_softmax(x, dtype=torch.float32), fused_softmax(x, dtype=torch.bfloat16)
            return widened, across, fused_softmax(widened, dtype=torch.float16), fused_softmax(widened)

    table = custom_translation_table(20)
    program = torch.onnx.export(
        Cast().eval(), (models.example().half(),), dynamo=True, opset_version=20, verbose=False, custom_translation_table=table
    )
    graph = program.model.graph
    assert {n.inputs[0].dtype.name for n in graph if n.op_type == "Softmax"} == {"FLOAT"}
    assert [output.dtype.name for output in graph.outputs] == ["FLOAT", "BFLOAT16", "FLOAT16", "FLOAT"]
    assert set(table) == {op.fwd for op in REGISTRY.values() if op.onnx is not None}
    with pytest.raises(ExportError, match="linear: no ONNX translation of the activation 'none such'"):
        table[REGISTRY["linear"].fwd](np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), None, "none such")
    with pytest.raises(ExportError, match="layer_norm: without weight its last dimension cannot be dynamic"):
        table[REGISTRY["layer_norm"].fwd](SimpleNamespace(shape=(2, "columns"), dtype=1))


def test_submodule(path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(models.WIDTH)
            self.part = nn.Sequential(OrderedDict(first=nn.Linear(models.WIDTH, 8), second=nn.Linear(8, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(self.norm(x)).sum(1)

    model = Whole()
    x = models.example()
    export_submodule(model, "part", (x,), path, dynamic_shapes={"input": models.DYNAMIC[0]})
    graph = onnx.load(path).graph
    assert dims(graph.input[0]) == ["batch", "sequence", models.WIDTH]
    assert {"first.bias", "second.bias"} <= {i.name for i in graph.initializer}
    assert verify(path, model.part, SHAPES).ok
    with pytest.raises(ExportError, match=r"name: got 'part\.nothing'"):
        export_submodule(model, "part.nothing", (x,), path)
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ExportError, match="name: got 'spare', which the forward does not call"):
        export_submodule(model, "spare", (x,), path)
    assert not model.part._forward_pre_hooks


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    """The real model, fused: dims and names, other shapes, padding, one layer alone, and a process without fused_ops."""
    from fused_ops import fuse

    model, path = models.minilm(), tmp_path / "minilm.onnx"
    assert len(fuse(model).fused) >= 20
    export_onnx(model, models.bert_example(2, 16), path, dynamic_shapes=models.BERT_SHAPES)
    report = verify(path, model, [models.bert_example(1, 7), models.bert_example(3, 33)], max_relative_error=2e-5)
    assert report.ok, str(report)
    graph = onnx.load(path).graph
    names = {v.name: dims(v) for v in (*graph.input, *graph.output)}
    assert names == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", 384],
        "pooler_output": ["batch", 384],
    }
    counts = Counter(node.op_type for node in graph.node)
    assert (counts["LayerNormalization"], counts["Gelu"], counts["Softmax"]) == (13, 6, 6)
    assert "encoder.layer.5.intermediate.dense.weight.T" in {i.name for i in graph.initializer}
    code = f"""
import json, numpy as np, onnxruntime
ids = np.arange(1000, 1022).reshape(2, 11)
out = onnxruntime.InferenceSession({str(path)!r}).run(None, dict(input_ids=ids, attention_mask=np.ones_like(ids)))
print(json.dumps(out[1][:, :4].tolist()))
"""
    got = json.loads(models.without_fused_ops(code, tmp_path))
    ids = torch.arange(1000, 1022).reshape(2, 11)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output[:, :4]
    np.testing.assert_allclose(got, expected, atol=1e-5)

    layer = tmp_path / "layer.onnx"
    shapes = {"hidden_states": {0: "batch", 1: "sequence"}}
    export_submodule(model, "encoder.layer.0", {"input_ids": ids}, layer, dynamic_shapes=shapes)
    assert [v.name for v in onnx.load(layer).graph.input] == ["hidden_states"]
    assert verify(layer, model.encoder.layer[0], [torch.randn(3, 9, 384)]).ok


def test_an_example_that_was_trained_on(path: Path) -> None:
    """torch.export traces an example's .grad too, and fails on its dynamic shapes."""
    model = nn.Linear(models.WIDTH, 8)
    example = models.example().requires_grad_()
    model(example).sum().backward()
    assert example.grad is not None
    export_onnx(model, (example,), path, dynamic_shapes=models.DYNAMIC)
    assert verify(path, model, SHAPES, max_relative_error=2e-6).ok
