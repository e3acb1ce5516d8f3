"""Every op that trains as ONNX: by its own translation, where it has one, and by export_onnx; run by ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fused_ops import REGISTRY
from fused_ops.export import custom_translation_table, export_onnx

OPSETS = (20, 23)
OPS = [op for op in REGISTRY.values() if op.trains]
RMS_NORM = {20: "ReduceMean", 23: "RMSNormalization"}


class OneOp(nn.Module):
    """The public function of an op on its example: the first tensor is the input, the others are parameters."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.op = REGISTRY[name]
        self.sample = self.op.example("cpu", dtype)
        self.x: Tensor = self.sample.args[0]

    def forward(self, x: Tensor) -> Any:
        return self.op.public(x, *self.sample.args[1:], **self.sample.kwargs)


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("op", [op.name for op in OPS if op.onnx is not None])
def test_an_op_by_its_own_translation(op: str, opset: int, tmp_path: Path) -> None:
    module, path = OneOp(op).eval(), tmp_path / "op.onnx"
    table = custom_translation_table(opset)
    torch.onnx.export(
        module, (module.x,), path, dynamo=True, opset_version=opset, custom_translation_table=table, verbose=False
    )  # fmt: skip
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    torch.testing.assert_close(run(path, module.x), module(module.x))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("op", [op.name for op in OPS])
def test_an_op_by_export_onnx(op: str, opset: int, tmp_path: Path) -> None:
    module, path = OneOp(op).eval(), tmp_path / "op.onnx"
    export_onnx(module, (module.x,), path, opset=opset)
    torch.testing.assert_close(run(path, module.x), module(module.x))


@pytest.mark.parametrize("opset", OPSETS)
def test_rms_norm_of_16_bits_is_rounded_once(opset: int, tmp_path: Path) -> None:
    """RMSNormalization may round before it multiplies with its scale, and runtimes differ in that: it computes in fp32."""
    module, path = OneOp("rms_norm", torch.float16).eval(), tmp_path / "op.onnx"
    export_onnx(module, (module.x,), path, opset=opset)
    types = [node.op_type for node in onnx.load(path).graph.node]
    assert types[0] == types[-1] == "Cast"
    assert RMS_NORM[opset] in types
    assert torch.equal(run(path, module.x), module(module.x))


@pytest.mark.parametrize("by", ["export_onnx", "translation"])
def test_layer_norm_of_mixed_dtypes(by: str, tmp_path: Path) -> None:
    """LayerNormalization takes one dtype: where input's and the parameters' differ, it computes in fp32."""
    module, path = OneOp("layer_norm").eval(), tmp_path / "op.onnx"
    x, shape, weight, bias = module.sample.args[:4]
    module.x, module.sample = x.half(), dataclasses.replace(module.sample, args=(x.half(), shape, weight, bias.double()))
    if by == "export_onnx":
        export_onnx(module, (module.x,), path)
    else:
        table = custom_translation_table(20)
        torch.onnx.export(
            module, (module.x,), path, dynamo=True, opset_version=20, custom_translation_table=table, verbose=False
        )
    assert [node.op_type for node in onnx.load(path).graph.node].count("LayerNormalization") == 1
    torch.testing.assert_close(run(path, module.x), module(module.x))
