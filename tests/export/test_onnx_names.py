"""export_onnx names dimensions, weights, nodes, inputs and outputs as the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

from fused_ops import fused_softmax
from fused_ops.export import ExportError, export_onnx, verify
from tests.export import models
from tests.export.exports import Exports
from tests.export.onnx_helpers import dims


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
    model = nn.Linear(models.WIDTH, 8)
    export_onnx(model, (models.example(),), path, dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.AUTO},))
    assert dims(onnx.load(path).graph.input[0]) == ["input_dim_0", "input_dim_1", models.WIDTH]


def test_derived_dims(path: Path) -> None:
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused_softmax(x.reshape(x.shape[0] // 2, 2, 8))

    half = Dim("half", max=100)
    export_onnx(Pairs(), (torch.randn(6, 8),), path, dynamic_shapes=({0: 2 * half},))
    assert dims(onnx.load(path).graph.input[0]) == ["2*half", 8]
    assert verify(path, Pairs(), [torch.randn(10, 8)]).ok


@pytest.mark.xdist_group("export-mlp")
def test_weights_nodes_inputs_and_outputs_keep_their_names(exported: Exports) -> None:
    graph = onnx.load(exported("mlp")[1]).graph
    weights = {i.name for i in graph.initializer}
    assert {"norm.weight", "norm.bias", "up.bias", "up.weight.T", "down.weight.T"} <= weights
    assert {"norm/LayerNormalization", "up/MatMul", "down/MatMul"} <= {n.name for n in graph.node}
    assert [v.name for v in (*graph.input, *graph.output)] == ["x", "output"]
    assert not any(n.metadata_props or n.doc_string for n in graph.node), "source lines of the exporting machine"


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
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.up(x)
            return y, -y

    with pytest.raises(ExportError, match="export_onnx: output_names: got"):
        export_onnx(Two(), (torch.ones(3, 4),), path, output_names=names)
    assert not list(path.parent.iterdir())


@pytest.mark.xdist_group("export-decoder")
def test_output_name_of_an_internal_value(exported: Exports) -> None:
    """torch's exporter gives two values one name then: no error, and a file that is not ONNX."""
    _, path = exported("decoder", dynamic=False)
    inside = [out for node in onnx.load(path).graph.node for out in node.output if out != "output"]
    for name in inside[:: max(1, len(inside) // 4)]:
        model, path = exported("decoder", dynamic=False, output_names=[name])
        graph = onnx.load(path).graph
        assert graph.output[0].name == name
        assert [out for node in graph.node for out in node.output].count(name) == 1
        assert verify(path, model, models.example()).ok
