"""Forwards patched by another library after fuse, on an instance and on a class, and names bound anew. In fp64."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fuse.doors import (
    TRANSFORMERS,
    Mlp,
    assert_same,
    fused_copy,
    on,
    outcome,
    pair,
    quiet_fuse,
    x4,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def _swiglu(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)) * 1.5


def _bert(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.tanh(self.dense(hidden_states)) + self.intermediate_act_fn(self.dense(hidden_states))


def _gpt2(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.c_proj(torch.tanh(self.c_fc(hidden_states)))


def _vit(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.fc2(self.fc1(hidden_states) * self.activation_fn(hidden_states).sum())


def _t5(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.wo(self.wi(hidden_states).sin())


def _t5_gated(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.wo(self.act(self.wi_1(hidden_states)) * self.wi_0(hidden_states))


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(self.fc1(x)) - self.act(x)


PATCHES = {
    "llama": ("LlamaMLP", _swiglu),
    "bert": ("BertIntermediate", _bert),
    "gpt2": ("GPT2MLP", _gpt2),
    "vit": ("ViTMLP", _vit),
    "t5": ("T5DenseActDense", _t5),
    "t5_gated": ("T5DenseGatedActDense", _t5_gated),
    "mlp": ("Mlp", _mlp),
    "function_mlp": ("FunctionMlp", _mlp),
}


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("where", ["instance", "class", "class, then fused again"])
def test_another_librarys_forward(name: str, where: str, monkeypatch: pytest.MonkeyPatch):
    model, fused, arguments = pair(name)
    model.eval()
    before = outcome(model, on(arguments), backward=False)
    cls, forward = PATCHES[name]
    if where == "instance":
        for m in (model, fused):
            for part in m.modules():
                if type(part).__name__ == cls:
                    part.forward = types.MethodType(forward, part)
    else:
        known = next(type(part) for part in model.modules() if type(part).__name__ == cls)
        monkeypatch.setattr(known, "forward", forward)
        if where.endswith("again"):
            quiet_fuse(fused)
    assert not torch.allclose(outcome(model, on(arguments), backward=False)[0][1], before[0][1]), "the patch does nothing"
    assert_same(model, fused, on(arguments))
    if where != "instance":
        monkeypatch.undo()
        assert_same(model, fused, on(arguments))


@pytest.mark.parametrize("cls", [nn.Linear, nn.GELU, nn.Sequential, nn.LayerNorm], ids=lambda c: c.__name__)
def test_a_forward_patched_on_torchs_class(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(Mlp(), nn.Linear(4, 4), nn.GELU()).double()
    fused = fused_copy(model)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, input: forward(self, input) * 2 + 1)
    assert_same(model, fused, lambda m: m(x4()))


def test_what_a_known_module_is_told_later():
    model = nn.ModuleDict(
        {"mlp": Mlp(act=nn.GELU()), "seq": nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(), nn.Softmax(dim=-1))}
    ).double()
    fused = fused_copy(model)
    changes: list[Callable[[Any], None]] = [
        lambda m: setattr(m.mlp.act, "approximate", "tanh"),
        lambda m: setattr(m.mlp.norm, "eps", 0.5),
        lambda m: setattr(m.mlp.norm, "bias", None),
        lambda m: setattr(m.mlp.norm, "weight", None),
        lambda m: setattr(m.mlp.drop, "p", 0.9),
        lambda m: setattr(m.mlp.drop, "training", True),
        lambda m: setattr(m.seq[1], "negative_slope", 0.7),
        lambda m: setattr(m.seq[2], "dim", 0),
        lambda m: setattr(m.mlp.act, "forward", torch.sin),
        lambda m: setattr(m.mlp.fc2, "forward", lambda x: x * 2),
        lambda m: setattr(m.seq[0], "__class__", DoubledLinear),
    ]
    for change in changes:
        for m in (model, fused):
            change(m)
        assert_same(model, fused, lambda m: m.mlp(x4()) + m.seq(x4()))


class DoubledLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


ACTIVATION = F.gelu
FACTOR = 1.0


class Globals(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)

    def forward(self, x):
        return ACTIVATION(self.fc1(x)) * FACTOR + torch.relu(self.fc2(x)) + F.silu(self.fc1(x)) + self.fc2(x).sigmoid()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (None, "ACTIVATION", torch.tanh),
        (None, "FACTOR", 5.0),
        (F, "silu", lambda x: x * 9),
        (torch, "relu", lambda x: x + 3),
        (F, "gelu", lambda x: x - 1),
        (torch.Tensor, "sigmoid", lambda x: x * 0.5),
    ],
    ids=["own activation", "own number", "F.silu", "torch.relu", "F.gelu", "Tensor.sigmoid"],
)
def test_names_bound_anew_after_fuse(owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch):
    model = Globals().double()
    fused = fused_copy(model)
    assert_same(model, fused, lambda m: m(x4()))
    if owner is None:
        monkeypatch.setitem(globals(), name, value)
    else:
        monkeypatch.setattr(owner, name, value)
    assert_same(model, fused, lambda m: m(x4()))
    monkeypatch.undo()
    assert_same(model, fused, lambda m: m(x4()))


def test_transformers_have_all_their_patches():
    assert set(TRANSFORMERS) < set(PATCHES)
