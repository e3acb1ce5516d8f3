"""fused_ops.nn: the modules by themselves."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from fused_ops import fuse
from fused_ops.nn import FusedLayerNorm, FusedLinear, FusedRMSNorm, FusedSoftmax
from fused_ops.ops.linear.activations import ACTIVATIONS
from fused_ops.ops.linear.linear_reference import linear_eager


@pytest.mark.parametrize(
    ("fused", "unfused"),
    [
        (FusedLayerNorm((3, 4)), nn.LayerNorm((3, 4))),
        (FusedLayerNorm(4, bias=False), nn.LayerNorm(4, bias=False)),
        (FusedLayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, elementwise_affine=False)),
        (FusedRMSNorm((3, 4)), nn.RMSNorm((3, 4))),
        (FusedRMSNorm(4, eps=1e-3, elementwise_affine=False), nn.RMSNorm(4, eps=1e-3, elementwise_affine=False)),
        (FusedLinear(4, 6), nn.Linear(4, 6)),
        (FusedLinear(4, 6, bias=False), nn.Linear(4, 6, bias=False)),
        (FusedSoftmax(dim=1), nn.Softmax(dim=1)),
    ],
    ids=lambda m: str(m),
)
def test_same_state_and_results(fused: nn.Module, unfused: nn.Module):
    assert isinstance(fused, type(unfused))
    unfused.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(fused(x), unfused(x))
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(copied(x), unfused(x))
    torch.testing.assert_close(fused.to(torch.float64)(x.double()), unfused.double()(x.double()))
    assert repr(fused).startswith("Fused")


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "none"])
def test_linear_applies_its_activation(activation: str):
    layer = FusedLinear(4, 6, activation=activation)
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), linear_eager(x, layer.weight, layer.bias, activation))
    assert f"activation='{activation}'" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_linear_refuses_an_unknown_activation():
    with pytest.raises(RuntimeError, match=r"FusedLinear: activation: got 'swish', allowed: None, 'relu', 'gelu'"):
        FusedLinear(4, 6, activation="swish")


def test_softmax_without_dim_is_torchs():
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        result = FusedSoftmax()(x)
    torch.testing.assert_close(result, x.softmax(1))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_go_to_aten(layout: torch.layout):
    """Each row by itself gives the same; torch has no RMS norm of strided ones."""
    with warnings.catch_warnings():  # strided ones are a prototype, and say so
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
    layers = [FusedLayerNorm(4), FusedLinear(4, 6, activation="gelu"), FusedSoftmax(dim=-1)]
    if layout is torch.jagged:
        layers.append(FusedRMSNorm(4))
    for layer in layers:
        result = layer(x)
        assert result.is_nested
        for got, row in zip(result.unbind(), x.unbind()):
            torch.testing.assert_close(got, layer(row))


def test_quantize_dynamic_leaves_a_fused_linear_as_it_is():
    """torch goes by the exact class: only the torch.nn.Linear becomes a quantised one, and every activation stays."""
    model = nn.Sequential(
        FusedLayerNorm(8), FusedLinear(8, 16, activation="gelu"), FusedLinear(16, 16), nn.Linear(16, 4)
    ).eval()
    x = torch.randn(5, 8)
    with warnings.catch_warnings():  # deprecated in favour of torchao
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert [type(layer) for layer in quantized] == [
        FusedLayerNorm, FusedLinear, FusedLinear, torch.ao.nn.quantized.dynamic.Linear,
    ]  # fmt: skip
    assert torch.equal(quantized[:3](x), model[:3](x))
    expected = model(x)
    assert (quantized(x) - expected).abs().max() < 0.02 * expected.abs().max()
    with pytest.raises(AssertionError, match="FusedLinear"):  # where torch is told to take it, it says that it cannot
        torch.ao.nn.quantized.dynamic.Linear.from_float(model[1])


def test_scripted():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2), nn.Softmax(dim=-1)).eval()
    x = torch.randn(5, 4)
    expected = model(x)
    fuse(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected)


def test_each_module_scripted_traced_and_compiled():
    """No forward branches on its input."""
    x = torch.randn(2, 3, 4)
    for layer in (FusedLayerNorm(4), FusedRMSNorm(4), FusedLinear(4, 6, activation="gelu_tanh"), FusedSoftmax(dim=1)):
        expected = layer(x)
        torch.testing.assert_close(torch.jit.script(layer)(x), expected)
        torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), expected)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
