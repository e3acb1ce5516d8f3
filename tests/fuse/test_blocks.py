"""Gated pairs and whole MLPs: act(gate(x)) * up(x) and fc2(act(fc1(x))) as one call each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import fuse, unfuse
from fused_ops._fuse import calls as fused_calls_of_forwards
from tests.fuse.models import MODELS, Mlp
from tests.fuse.test_fuse import assert_same, detail, status
from tests.fuse.test_matching import x4


class Calls(list):
    """Wraps fused_gated_linear and fused_mlp, and counts their calls."""

    def wrap(self, name: str, function):
        def counted(*args):
            self.append(name)
            return function(*args)

        counted.__name__ = counted.__qualname__ = f"counted_{name}"
        return counted


@pytest.fixture
def calls(monkeypatch) -> Calls:
    calls = Calls()
    for name in ("fused_gated_linear", "fused_mlp"):
        monkeypatch.setattr(fused_calls_of_forwards, name, calls.wrap(name, getattr(fused_calls_of_forwards, name)))
    return calls


class Gated(nn.Module):
    """LLaMA's MLP."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(4, 8, bias=bias)
        self.up_proj = nn.Linear(4, 8, bias=bias)
        self.down_proj = nn.Linear(8, 4, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GatedFunction(Gated):
    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(torch.mul(up, F.gelu(self.gate_proj(x), approximate="tanh")))


class OtherInputs(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 1))


class GateUsedTwice(Gated):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x) + gate)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", [Gated, GatedFunction])
@pytest.mark.parametrize("ops", [None, ["gated_linear"]], ids=["all", "alone"])
def test_gated(cls: type[Gated], bias: bool, ops, calls: Calls):
    model = cls(bias)
    reference = copy.deepcopy(model)
    report = fuse(model, ops=ops)
    assert status(report, "gated_linear") == {"": "fused"}
    assert detail(report, "").startswith("gate_proj and up_proj with ")
    assert detail(report, "up_proj") == "part of the gated_linear"
    model(x4())
    assert calls == ["fused_gated_linear"]
    assert_same(model, reference, x4())
    assert [c.status for c in fuse(model, ops=ops) if c.name == ""] == ["already fused"]
    unfuse(model)
    assert type(model) is cls
    calls.clear()
    assert_same(model, reference, x4())
    assert calls == []


@pytest.mark.parametrize("cls", [OtherInputs, GateUsedTwice])
def test_not_gated(cls: type[Gated], calls: Calls):
    model = cls()
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert not [c for c in report.fused if c.op == "gated_linear"]
    assert_same(model, reference, x4())
    assert calls == []


def test_filter_fn_holds_for_gates(calls: Calls):
    model = Gated()
    report = fuse(model, filter_fn=lambda name, module: name != "up_proj")
    assert [c.detail for c in report if c.op == "gated_linear"] == ["left out by filter_fn"]
    model(x4())
    assert calls == []


def test_mlp_fuses_whole_in_training_while_its_dropout_is_idle(calls: Calls):
    model = Mlp(4, 8)
    reference = copy.deepcopy(model)
    assert not [c for c in fuse(model) if c.op == "mlp"]  # its dropout, 0.1, stands between in training
    unfuse(model)
    for m in (model, reference):
        m.drop1.p = 0.0
    report = fuse(model)
    assert detail(report, "") == "fc1 and fc2 with gelu, in training only"
    assert_same(model, reference, x4())
    calls.clear()
    model.eval()
    model(x4())
    assert calls == []
    model.train()
    model(x4())
    assert calls == ["fused_mlp"]
    for m in (model, reference):  # what was idle when fused may wake up
        m.drop1.p = 0.5
        m.drop2.p = 0.0
    calls.clear()
    assert_same(model, reference, x4())
    model.drop1.p = reference.drop1.p = 0.0
    model.norm, reference.norm = nn.Tanh(), nn.Tanh()
    assert_same(model, reference, x4())
    assert calls == []


def test_copies_stay_fused(calls: Calls):
    mlp = Mlp(4, 8)
    mlp.drop1.p = mlp.drop2.p = 0.0
    for model in (Gated(), mlp):
        expected = model(x4())
        fuse(model)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            calls.clear()
            torch.testing.assert_close(copied(x4()), expected)
            assert len(calls) == 1


@pytest.mark.parametrize(("name", "op"), [("llama", "gated_linear"), ("clip_text", "mlp"), ("gpt2", "mlp"), ("vit", "mlp")])
def test_models(name: str, op: str, calls: Calls):
    torch.manual_seed(0)
    model, arguments = MODELS[name](2)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = model(**arguments)
    report = fuse(model)
    assert report.counts()[op] == (2, 2), report.table()
    got = model(**arguments)
    assert calls == [f"fused_{op}"] * 2
    got, expected = (o if isinstance(o, torch.Tensor) else o[0] for o in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_hooked_activation_keeps_its_block(calls: Calls):
    model = Gated()
    seen = []
    model.act_fn.register_forward_hook(lambda m, args, out: seen.append(out))
    with pytest.warns(UserWarning, match="nothing was fused"):
        fuse(model)
    model(x4())
    assert len(seen) == 1
    assert calls == []


def test_t5_fuses_its_gate_beside_its_type_tests(calls: Calls):
    model, arguments = MODELS["t5_gated"](1)
    fuse(model)
    model(**arguments)
    assert calls == ["fused_gated_linear"] * 2


def test_sequential_may_be_sliced_and_extended(calls: Calls):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    reference = copy.deepcopy(model)
    fuse(model)
    model(x4())
    assert calls == ["fused_mlp"]
    torch.testing.assert_close(model[:2](x4()), reference[:2](x4()))
    model.append(nn.Tanh())
    reference.append(nn.Tanh())
    assert_same(model, reference, x4())


@pytest.mark.parametrize("cls", [Gated, GatedFunction])
def test_scripting_takes_the_original_forward(cls: type[Gated]):
    model = cls()
    expected = model(x4())
    fuse(model)
    torch.testing.assert_close(torch.jit.script(nn.Sequential(model))(x4()), expected)
