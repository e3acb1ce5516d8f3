"""torch.nn's own Transformer layers, whose inference fast path reads weights past the modules that hold them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fused_ops import fuse, unfuse
from fused_ops.nn import FusedLayerNorm
from tests.fuse.test_fuse import detail, fused_calls, status


def encoder(**options) -> nn.TransformerEncoder:
    options = {"activation": "gelu", "batch_first": True, "dropout": 0.1} | options
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, **options), 2, norm=nn.LayerNorm(8))


X = torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8)
PADDING = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"norm_first": True}, {"activation": nn.GELU()}], ids=str)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_equal_on_and_off_the_fast_path(options: dict, padding: torch.Tensor | None):
    model = encoder(**options)
    fused = copy.deepcopy(model)
    report = fuse(fused)
    assert status(report, "linear")["layers.0.linear1"] == "fused"
    assert type(fused.layers[0].linear1) is nn.Linear
    assert isinstance(fused.layers[0], nn.TransformerEncoderLayer)
    assert isinstance(fused.layers[0].norm1, FusedLayerNorm)
    keep = slice(None) if padding is None else ~padding  # padded positions hold anything
    model.eval()
    fused.eval()
    for grad in (False, True):  # without a gradient torch takes its fast path
        with torch.set_grad_enabled(grad):
            got, expected = (m(X, src_key_padding_mask=padding)[keep] for m in (fused, model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for m in (model, fused):
        m.train()
        torch.manual_seed(2)
        m(X, src_key_padding_mask=padding)[keep].square().sum().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    unfuse(fused)
    assert fused.layers[0].__dict__.get("activation") is model.layers[0].__dict__.get("activation")


def test_the_report_says_that_the_fast_path_goes_by():
    model = encoder().eval()
    report = fuse(model)
    for name in ("layers.0.linear1", "layers.0.norm1", "layers.0.norm2"):
        assert "torch's own fast path" in detail(report, name), name
    assert "fast path" not in detail(report, "norm")
    assert detail(report, "layers.0.self_attn.out_proj") == "nn.MultiheadAttention reads its weight and never calls it"
    assert fused_calls(model, X) == ["layer_norm_fwd"]  # the last norm only: the report is right
    with no_fast_path():
        assert fused_calls(model, X).count("linear_fwd") == 2


@contextmanager
def no_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_decoder():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert status(report, "linear")["layers.1.linear1"] == "fused"
    torch.testing.assert_close(model(X, X + 1), reference(X, X + 1), rtol=1e-4, atol=1e-5)
