"""export_onnx at fp16 and bf16: what stays fp32, what would overflow, and masks that stay finite."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from fused_ops import fused_softmax
from fused_ops.export import ExportError, export_onnx, verify
from tests.export import models
from tests.export.exports import NAMES, Exports
from tests.export.onnx_helpers import SHAPES, types_of


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_keeps_norms_and_softmax_in_fp32(name: str, precision: str, exported: Exports) -> None:
    model, path = exported(name, precision=precision)
    report = verify(path, model, SHAPES)
    assert report.ok, str(report)
    loaded = onnx.load(path)
    types = types_of(loaded)
    low = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert types["x"] == types[loaded.graph.output[0].name] == onnx.TensorProto.FLOAT
    for node in loaded.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert {types[n] for n in (*node.input, *node.output) if n} == {onnx.TensorProto.FLOAT}
        elif node.op_type in ("MatMul", "Gelu"):
            assert {types[n] for n in (*node.input, *node.output)} == {low}


@pytest.mark.xdist_group("export-mlp")
def test_low_precision_inputs_and_outputs_too(exported: Exports) -> None:
    model, path = exported("mlp", precision="fp16", keep_io_types=False)
    graph = onnx.load(path).graph
    values = [*graph.input, *graph.output]
    assert {v.type.tensor_type.elem_type for v in values} == {onnx.TensorProto.FLOAT16}
    assert verify(path, model, SHAPES).ok


@pytest.mark.xdist_group("export-decoder")
def test_keep_fp32_takes_operators_and_modules(exported: Exports) -> None:
    _, path = exported("decoder", dynamic=False, precision="fp16", keep_fp32=("Gelu", "attention"))
    loaded = onnx.load(path)
    types = types_of(loaded)
    for node in loaded.graph.node:
        if node.op_type == "Gelu" or (node.name.startswith("attention/") and node.op_type == "MatMul"):
            assert {types[n] for n in (*node.input, *node.output)} == {onnx.TensorProto.FLOAT}
        if node.op_type == "LayerNormalization":
            assert types[node.input[0]] == onnx.TensorProto.FLOAT16
    with pytest.raises(ExportError, match=r"keep_fp32: got 'nothing\.here'"):
        exported("decoder", dynamic=False, precision="fp16", keep_fp32=("nothing.here",))


def test_fp16_norm_does_not_overflow(path: Path) -> None:
    """The squares of 300 do not fit fp16: a norm computed in it gives zeros or infinities."""

    class Others(nn.Module):
        """Norms that share no node: a function, a division by the length, and primitives."""

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            centred = x - x.mean(-1, keepdim=True)
            return {
                "functional": nn.functional.rms_norm(x, (models.WIDTH,), eps=1e-6),
                "normalize": nn.functional.normalize(x, dim=-1),
                "by_hand": centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5),
            }

    x = 300 * models.example()
    x[0, 0] = 0
    for model, opset, outputs in ((models.RMS(), 20, 1), (models.RMS(), 23, 1), (Others(), 20, 3)):
        export_onnx(model, (x,), path, precision="fp16", opset=opset)
        # the reference evaluator computes in fp16 where the graph says so; ONNX Runtime's CPU mostly does not
        report = verify(path, model, x, max_relative_error=2e-3, runtime="reference")
        assert report.ok, f"{type(model).__name__} at {opset}: {report}"
        assert len(report.rows) == outputs


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


@pytest.mark.xdist_group("export-mlp")
def test_low_precision_weights_keep_their_names(exported: Exports) -> None:
    _, path = exported("mlp", precision="fp16")
    types = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert types["up.weight.T"] == onnx.TensorProto.FLOAT16
    assert types["norm.weight"] == onnx.TensorProto.FLOAT
