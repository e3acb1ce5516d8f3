"""export_onnx: right results at other shapes, standard operators, names kept, and each trap met before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim

from fused_ops import REGISTRY, fused_linear, fused_softmax
from fused_ops.export import ExportError, build_engine, custom_translation_table, export_onnx, export_submodule, verify
from tests.export import models

SHAPES = [models.example(1, 1), models.example(3, 7), models.example(4, 33)]


def dims(value: Any) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", ["mlp", "decoder", "vit"])
def test_dynamic_fp32(name: str, fused: bool, path: Path) -> None:
    model = models.make(name, fused)
    export_onnx(model, (models.example(),), path, dynamic_shapes=models.DYNAMIC)
    report = verify(path, model, SHAPES, max_relative_error=2e-6)
    assert report.ok, str(report)
    assert len(report.rows) == len(SHAPES)
    exported = onnx.load(path)
    assert {node.domain for node in exported.graph.node} == {""}
    assert {o.domain: o.version for o in exported.opset_import} == {"": 20}
    assert operators(exported)["LayerNormalization"] == (1 if name == "mlp" else 2)
    assert operators(exported)["Gelu"] == 1
    assert operators(exported)["Softmax"] == (0 if name == "mlp" else 1)


@pytest.mark.parametrize("name", ["mlp", "decoder", "vit"])
def test_static(name: str, path: Path) -> None:
    model = models.make(name)
    export_onnx(model, (models.example(),), path)
    assert dims(onnx.load(path).graph.input[0]) == [2, 5, models.WIDTH]
    assert verify(path, model, models.example(), max_relative_error=2e-6).ok


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["mlp", "decoder", "vit"])
def test_low_precision_keeps_norms_and_softmax_in_fp32(name: str, precision: str, path: Path) -> None:
    model = models.make(name)
    export_onnx(model, (models.example(),), path, dynamic_shapes=models.DYNAMIC, precision=precision)
    report = verify(path, model, SHAPES)
    assert report.ok, str(report)
    exported = onnx.load(path)
    types = types_of(exported)
    low = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert types["x"] == types[exported.graph.output[0].name] == onnx.TensorProto.FLOAT
    for node in exported.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert {types[n] for n in (*node.input, *node.output) if n} == {onnx.TensorProto.FLOAT}
        elif node.op_type in ("MatMul", "Gelu"):
            assert {types[n] for n in (*node.input, *node.output)} == {low}


def types_of(model: Any) -> dict[str, int]:
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in model.graph.initializer}


def test_low_precision_inputs_and_outputs_too(path: Path) -> None:
    model = models.make("mlp")
    export_onnx(model, (models.example(),), path, dynamic_shapes=models.DYNAMIC, precision="fp16", keep_io_types=False)
    exported = onnx.load(path)
    values = [*exported.graph.input, *exported.graph.output]
    assert {v.type.tensor_type.elem_type for v in values} == {onnx.TensorProto.FLOAT16}
    assert verify(path, model, SHAPES).ok


def test_keep_fp32_takes_operators_and_modules(path: Path) -> None:
    model = models.make("decoder")
    export_onnx(model, (models.example(),), path, precision="fp16", keep_fp32=("Gelu", "attention"))
    exported = onnx.load(path)
    types = types_of(exported)
    for node in exported.graph.node:
        if node.op_type == "Gelu" or (node.name.startswith("attention/") and node.op_type == "MatMul"):
            assert {types[n] for n in (*node.input, *node.output)} == {onnx.TensorProto.FLOAT}
        if node.op_type == "LayerNormalization":
            assert types[node.input[0]] == onnx.TensorProto.FLOAT16
    with pytest.raises(ExportError, match=r"keep_fp32: got 'nothing\.here'"):
        export_onnx(model, (models.example(),), path, precision="fp16", keep_fp32=("nothing.here",))


def test_fp16_norm_does_not_overflow(path: Path) -> None:
    """The squares of 300 do not fit fp16: a norm computed in it gives zeros or infinities."""

    class Functional(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, (models.WIDTH,), eps=1e-6)

    class Normalize(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(x, dim=-1)

    class ByHand(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            centred = x - x.mean(-1, keepdim=True)
            return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)

    x = 300 * models.example()
    x[0, 0] = 0
    for model, opset in ((models.RMS(), 20), (models.RMS(), 23), (Functional(), 20), (Normalize(), 20), (ByHand(), 20)):
        export_onnx(model, (x,), path, precision="fp16", opset=opset)
        # the reference evaluator computes in fp16 where the graph says so; ONNX Runtime's CPU mostly does not
        report = verify(path, model, x, max_relative_error=2e-3, runtime="reference")
        assert report.ok, f"{type(model).__name__} at {opset}: {report}"


class Rotary(nn.Module):
    """Angles of positions far beyond 2048, where fp16 has no odd numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 10000.0 ** -torch.linspace(0, 1, models.WIDTH))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[..., None].float() * self.frequencies
        return x * torch.cos(angles) + torch.sin(angles)


def test_fp16_keeps_positions_exact(path: Path) -> None:
    model = Rotary().eval()
    args = (models.example(1, 64), torch.arange(4000, 4064)[None])
    export_onnx(model, args, path, precision="fp16")
    report = verify(path, model, args, max_relative_error=5e-3)
    assert report.ok, str(report)


class MaskedRow(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return fused_softmax(x.masked_fill(~mask, torch.finfo(torch.float32).min))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_mask_value_stays_finite(precision: str, path: Path) -> None:
    """finfo.min is beyond fp16 and rounds to -inf in bf16: a fully masked row would become NaN."""
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    args = (torch.randn(3, 8), mask)
    export_onnx(MaskedRow(), args, path, precision=precision)
    report = verify(path, MaskedRow(), args)
    assert report.ok, str(report)


def test_infinite_constants_stay_infinite(path: Path) -> None:
    class Infinite(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(~mask, -float("inf"))

    args = (torch.randn(2, 4), torch.tensor([[True, False, True, True]]).expand(2, 4).contiguous())
    export_onnx(Infinite(), args, path, precision="fp16")
    assert verify(path, Infinite(), args).ok


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
    for opset, one in ((20, False), (23, False), (23, True), (25, False)):
        export_onnx(Attend(), args, path, opset=opset, precision="fp16", attention_operator=one)
        counts = operators(onnx.load(path))
        assert (counts["Attention"], counts["Softmax"]) == ((3, 0) if one else (0, 3))
        assert verify(path, Attend(), args).ok
    with pytest.raises(ExportError, match="attention_operator: got True at opset 20"):
        export_onnx(Attend(), args, path, attention_operator=True)


def test_dims_are_named_and_shared(path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return fused_softmax(a + b[:, None]).flatten(0, 1)

    batch, length = Dim("batch"), Dim("length", max=512)
    shapes = {"a": {0: batch, 1: length}, "b": {0: batch}}
    export_onnx(Two(), {"b": torch.randn(2, 8), "a": torch.randn(2, 5, 8)}, path, dynamic_shapes=shapes)
    graph = onnx.load(path).graph
    assert [(v.name, dims(v)) for v in graph.input] == [("a", ["batch", "length", 8]), ("b", ["batch", 8])]
    assert dims(graph.output[0]) in (["batch*length", 8], ["length*batch", 8])
    leftover = [
        dim for v in graph.value_info for dim in dims(v) if isinstance(dim, str) and dim[:1] in "su" and dim[1:].isdigit()
    ]
    assert not leftover


def test_unnamed_dims_are_named_after_their_input(path: Path) -> None:
    export_onnx(models.make("mlp"), (models.example(),), path, dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.AUTO},))
    assert dims(onnx.load(path).graph.input[0]) == ["x_dim_0", "x_dim_1", models.WIDTH]


def test_derived_dims(path: Path) -> None:
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused_softmax(x.reshape(x.shape[0] // 2, 2, 8))

    half = Dim("half", max=100)
    export_onnx(Pairs(), (torch.randn(6, 8),), path, dynamic_shapes=({0: 2 * half},))
    assert dims(onnx.load(path).graph.input[0]) == ["2*half", 8]
    assert verify(path, Pairs(), [torch.randn(10, 8)]).ok


def test_weights_nodes_inputs_and_outputs_keep_their_names(path: Path) -> None:
    export_onnx(models.make("mlp"), (models.example(),), path, dynamic_shapes=models.DYNAMIC)
    graph = onnx.load(path).graph
    weights = {i.name for i in graph.initializer}
    assert {"norm.weight", "norm.bias", "up.bias", "up.weight.T", "down.weight.T"} <= weights
    assert {"norm/LayerNormalization", "up/MatMul", "down/MatMul"} <= {n.name for n in graph.node}
    assert [v.name for v in (*graph.input, *graph.output)] == ["x", "output"]
    assert not any(n.metadata_props or n.doc_string for n in graph.node), "source lines of the exporting machine"


def test_low_precision_weights_keep_their_names(path: Path) -> None:
    export_onnx(models.make("mlp"), (models.example(),), path, precision="fp16")
    types = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert types["up.weight.T"] == onnx.TensorProto.FLOAT16
    assert types["norm.weight"] == onnx.TensorProto.FLOAT


def test_given_names_and_several_outputs(path: Path) -> None:
    model = models.DirectCalls().eval()
    export_onnx(model, (models.example(),), path, input_names=["tokens"], output_names=["probabilities", "hidden"])
    graph = onnx.load(path).graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["tokens", "probabilities", "hidden"]
    assert verify(path, model, models.example()).ok


def test_nested_results_get_names_from_their_keys(path: Path) -> None:
    export_onnx(models.Nest(), (models.example(),), path, precision="fp16")
    assert [v.name for v in onnx.load(path).graph.output] == ["probabilities", "rest_0", "rest_1"]
    assert verify(path, models.Nest(), models.example()).ok


@pytest.mark.parametrize("names", [["y", "y"], ["x", "y"], ["up.bias", "y"], ["y"], ["y", ""], "yz"])
def test_bad_output_names_are_refused(names: Any, path: Path) -> None:
    with pytest.raises(ExportError, match="export_onnx: output_names: got"):
        export_onnx(models.DirectCalls().eval(), (models.example(),), path, output_names=names)
    assert not list(path.parent.iterdir())


def test_output_name_of_an_internal_value(path: Path) -> None:
    """torch's exporter gives two values one name then: no error, and a file that is not ONNX."""
    model = models.make("decoder")
    export_onnx(model, (models.example(),), path)
    inside = [out for node in onnx.load(path).graph.node for out in node.output if out != "output"]
    for name in inside[:: max(1, len(inside) // 4)]:
        export_onnx(model, (models.example(),), path, output_names=[name])
        graph = onnx.load(path).graph
        assert graph.output[0].name == name
        assert [out for node in graph.node for out in node.output].count(name) == 1
        assert verify(path, model, models.example()).ok


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


def test_metadata_reaches_onnx_runtime(path: Path) -> None:
    export_onnx(models.make("mlp"), (models.example(),), path, metadata={"owner": "me"}, precision="fp16")
    found = ort.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert found["owner"] == "me"
    assert found["fused_ops.precision"] == "fp16"
    assert found["fused_ops.keep_fp32"] == "norm,softmax"
    assert found["torch.version"] == torch.__version__


def test_shapes_are_inferred_for_every_value(path: Path) -> None:
    export_onnx(models.make("decoder"), (models.example(),), path, dynamic_shapes=models.DYNAMIC, precision="fp16")
    graph = onnx.load(path).graph
    known = {v.name: v for v in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in node.output:
            assert name in known
            assert known[name].type.tensor_type.HasField("shape"), name


def test_external_data(path: Path) -> None:
    model = models.make("mlp")
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
    model = models.make("mlp")
    program = torch.export.export(model, (models.example(),), dynamic_shapes=({0: Dim("batch"), 1: Dim("sequence")},))
    export_onnx(program, (), path, dynamic_shapes=models.DYNAMIC)
    assert dims(onnx.load(path).graph.input[0])[:2] == ["batch", "sequence"]
    assert verify(path, model, SHAPES).ok


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


ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2")


class Table(nn.Module):
    """Every activation, every result of the norm, with and without its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(models.WIDTH, 24)
        self.weight = nn.Parameter(torch.randn(models.WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, mean, rstd = torch.ops.fused_ops.layer_norm_fwd(x, self.weight, None, 1e-5)
        plain = torch.ops.fused_ops.layer_norm_fwd(x, None, None, 1e-5)[0]
        outputs = [fused_linear(y, self.up.weight, self.up.bias, activation) for activation in ACTIVATIONS]
        return (*outputs, fused_softmax(plain, dim=1), mean, rstd)


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
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused_softmax(x, dtype=torch.float32)

    table = custom_translation_table(20)
    program = torch.onnx.export(
        Wide().eval(), (models.example().half(),), dynamo=True, opset_version=20, verbose=False, custom_translation_table=table
    )
    assert [n.op_type for n in program.model.graph] == ["Cast", "Softmax"]
    assert set(table) == {REGISTRY[name].fwd for name in ("softmax", "layer_norm", "linear")}


def test_submodule(path: Path) -> None:
    model = models.make("decoder")
    x = models.example()
    export_submodule(model, "attention", (x,), path, dynamic_shapes=models.DYNAMIC_BY_NAME)
    graph = onnx.load(path).graph
    assert dims(graph.input[0]) == ["batch", "sequence", models.WIDTH]
    assert {"qkv.bias", "out.bias"} <= {i.name for i in graph.initializer}
    assert verify(path, model.attention, SHAPES).ok
    with pytest.raises(ExportError, match=r"name: got 'attention\.nothing'"):
        export_submodule(model, "attention.nothing", (x,), path)
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ExportError, match="name: got 'spare', which the forward does not call"):
        export_submodule(model, "spare", (x,), path)
    assert not model.attention._forward_pre_hooks


@pytest.mark.parametrize(("name", "precision"), [("mlp", "bf16"), ("decoder", "fp32"), ("decoder", "fp16"), ("vit", "fp16")])
def test_tensorrt_rtx_builds_it(name: str, precision: str, path: Path) -> None:
    """TensorRT's parser and builder take the file, casts and named dimensions included; no engine runs without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    model = models.make(name)
    export_onnx(model, (models.example(),), path, dynamic_shapes=models.DYNAMIC, precision=precision)
    width = models.WIDTH
    profile = {"x": ((1, 1, width), (2, 8, width), (4, 64, width))}
    build_engine(path, path.with_suffix(".engine"), backend="tensorrt_rtx", profiles=profile, progress=False)
    assert path.with_suffix(".engine").stat().st_size > 1000


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
    model = models.make("mlp", True)
    example = models.example().requires_grad_()
    model(example).sum().backward()
    assert example.grad is not None
    export_onnx(model, (example,), path, dynamic_shapes=models.DYNAMIC)
    assert verify(path, model, SHAPES, max_relative_error=2e-6).ok
