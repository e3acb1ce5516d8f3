"""Which Linear and activation pairs fuse finds, and which it must refuse and say so."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from fused_ops import fuse, unfuse
from tests.fuse.test_fuse import Block, assert_same, detail, fused_calls, status


class Mlp(nn.Module):
    """fc1, an activation given as a function of (module, x), fc2."""

    def __init__(self, activate=None, **children: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 4)
        self.activate = activate
        for name, child in children.items():
            setattr(self, name, child)


class SharedActivation(Mlp):
    """One activation module after both Linears."""

    def forward(self, x):
        return self.act(self.fc2(self.act(self.fc1(x))))


class StrayActivation(Mlp):
    """The activation is also applied to something that is no Linear's output."""

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.act(x)


class TwoUsers(Mlp):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden)) + hidden.sum()


class OnlyInTraining(Mlp):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden) if self.training else hidden)


class OnlyForHalf(Mlp):
    """The value's dtype decides: both branches must be looked at."""

    def forward(self, x):
        hidden = self.fc1(x)
        if x.dtype == torch.float16:
            hidden = self.act(hidden)
        return self.fc2(hidden)


class OnlyWithMask(Mlp):
    def forward(self, x, mask=None):
        hidden = self.fc1(x)
        return self.fc2(hidden * mask) if mask is not None else self.fc2(self.act(hidden))


class BranchElsewhere(Mlp):
    """A branch that leaves the pair alone is no obstacle."""

    def forward(self, x):
        x = self.fc2(self.act(self.fc1(x)))
        if x.dtype == torch.float16:
            x = torch.clamp(x, -torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
        return x


class Loop(Mlp):
    def forward(self, x):
        for _ in range(len(x)):
            x = self.fc2(self.act(self.fc1(x)))
        return x


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.acts = nn.ModuleList([nn.ReLU(), nn.SiLU(), nn.Tanh()])

    def forward(self, x):
        for layer, act in zip(self.layers, self.acts):
            x = act(layer(x))
        return x


def x4() -> torch.Tensor:
    return torch.linspace(-2, 2, 12).reshape(3, 4)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
    ],
    ids=str,
)
def test_activation_modules(activation: nn.Module, name: str):
    model = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 4))
    reference = copy.deepcopy(model)
    assert detail(fuse(model), "0") == f"with {name} ({type(activation).__name__})"
    assert_same(model, reference, x4())


@pytest.mark.parametrize(
    "name",
    ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "quick_gelu", "silu", "relu2", "gelu_python"],
)
def test_transformers_activations(name: str):
    from transformers.activations import ACT2FN

    model = nn.Sequential(nn.Linear(4, 8), ACT2FN[name], nn.Linear(8, 4))
    reference = copy.deepcopy(model)
    assert status(fuse(model))["0"] == "fused"
    assert_same(model, reference, x4())


@pytest.mark.parametrize("activation", [nn.LeakyReLU(), nn.ELU(), nn.Softplus(), nn.Hardswish()], ids=str)
def test_activations_without_a_kernel_are_left(activation: nn.Module):
    model = nn.Sequential(nn.Linear(4, 8), activation, nn.ReLU())
    with pytest.warns(UserWarning, match="nothing was fused"):
        report = fuse(model)
    assert detail(report, "0") == f"no activation of fused_linear's follows ({type(activation).__name__} does)"


@pytest.mark.parametrize("cls", [SharedActivation, StrayActivation, BranchElsewhere, Loop], ids=lambda c: c.__name__)
def test_fused(cls: type[Mlp]):
    model = cls(act=nn.GELU())
    reference = copy.deepcopy(model)
    assert status(fuse(model))["fc1"] == "fused"
    assert_same(model, reference, x4())


def test_children_of_a_module_list_belong_to_the_module_that_calls_them():
    model = InAList()
    reference = copy.deepcopy(model)
    assert set(status(fuse(model)).values()) == {"fused"}
    assert_same(model, reference, x4())


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (TwoUsers, "its output, hidden, is used in more than one place, or a branch lies between"),
        (OnlyWithMask, "its output, hidden, is used in more than one place, or a branch lies between"),
        (OnlyInTraining, "its output, hidden, is used in more than one place, or a branch lies between"),
        (OnlyForHalf, "its output, hidden, is used in more than one place, or a branch lies between"),
    ],
    ids=lambda c: getattr(c, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refused(cls: type[Mlp], reason: str):
    model = cls(act=nn.GELU())
    reference = copy.deepcopy(model)
    report = fuse(model, ops=["linear"])
    assert report.fused == []
    assert detail(report, "fc1").startswith(reason)
    assert_same(model, reference, x4())


def test_activation_held_as_an_attribute():
    class HeldMlp(Mlp):
        def forward(self, x):
            return self.fc2(self.activate(self.fc1(x)))

    for function, name in ((F.relu, "relu"), (F.gelu, "gelu"), (torch.tanh, "tanh"), (F.silu, "silu")):
        model = HeldMlp(function)
        reference = copy.deepcopy(model)
        assert detail(fuse(model), "fc1") == f"with {name} (activate)"
        assert model.activate is function
        assert_same(model, reference, x4())
        unfuse(model)
        assert type(model) is HeldMlp


def test_a_module_shared_by_two_parents_keeps_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Identity()))
    reference = copy.deepcopy(model)
    assert status(fuse(model)) == {"0.0": "fused"}
    assert_same(model, reference, x4())


@pytest.mark.parametrize("where", ["fc1", "act"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_are_left_and_said(where: str, kind: str):
    model = Block()
    getattr(model.get_submodule(where), kind)(lambda *args: None)
    report = fuse(model)
    assert status(report) == {"norm": "fused", "fc1": "not fused", "fc2": "not fused"}
    assert "hook" in detail(report, "fc1")


def test_hooks_of_a_layer_norm_still_run():
    model = nn.Sequential(nn.LayerNorm(4))
    seen = []
    model[0].register_forward_hook(lambda m, args, out: seen.append(out) or out * 2)
    reference = copy.deepcopy(model)
    assert "its hooks stay" in detail(fuse(model), "0")
    torch.testing.assert_close(model(x4()), reference(x4()))
    assert len(seen) == 2


def test_parametrisations_are_left():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.LayerNorm(8))
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Softplus())
    with pytest.warns(UserWarning, match="nothing was fused"):
        report = fuse(model)
    assert detail(report, "0") == "weight is no parameter but computed (parametrisation, weight or spectral norm)"
    assert detail(report, "2") == "has a parametrisation: remove it (parametrize.remove_parametrizations) and call fuse again"


def test_old_style_norms_are_left():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 8)), nn.ReLU())
    with pytest.warns(UserWarning, match="nothing was fused"):
        assert "pre-hook" in detail(fuse(model), "0")


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnName(nn.Linear):
    pass


def test_a_linear_with_a_forward_of_its_own_is_left():
    model = nn.Sequential(Doubled(4, 4), nn.ReLU(), OwnName(4, 4), nn.ReLU())
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert status(report) == {"0": "not fused", "2": "fused"}
    assert detail(report, "0").endswith("Doubled is a subclass of Linear with a forward of its own, which fuse does not know")
    assert_same(model, reference, x4())


def test_quantised_weights_are_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert detail(fuse(model), "0") == "weight is int8 (quantised)"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert detail(fuse(model), "0") == "weight is float8_e4m3fn (quantised)"


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_left_and_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    expected = model(x4())
    report = fuse(model)
    assert detail(report, "0").endswith("dynamic.modules.linear.Linear is no torch.nn.Linear (quantised, or another library's)")
    torch.testing.assert_close(model(x4()), expected)


def test_replaced_forward_is_left():
    model = Block()
    real = model.fc1.forward
    model.fc1.forward = lambda x: real(x) + 1
    reference = copy.deepcopy(model)
    assert detail(fuse(model), "fc1").startswith("its forward was replaced on the instance")
    assert status(fuse(model))["norm"] == "already fused"
    assert reference is not model


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    model[2].weight = model[0].weight
    reference = copy.deepcopy(model)
    fuse(model)
    assert fused_calls(model, x4()) == ["linear_fwd"] * 2
    assert model[0].weight is model[2].weight
    assert len(list(model.parameters())) == 3
    assert_same(model, reference, x4())


def test_rms_norm_without_an_op_is_said():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            y = x.float()
            return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    with pytest.warns(UserWarning, match="nothing was fused"):
        report = fuse(nn.Sequential(LlamaRMSNorm()))
    assert "rounds before the weight" in detail(report, "0")
    with pytest.raises(ValueError, match="ops: got 'group_norm', allowed: 'layer_norm', 'rms_norm', 'softmax'"):
        fuse(nn.Sequential(LlamaRMSNorm()), ops=["group_norm"])


def test_tracing_leaves_no_trace():
    class Counting(Mlp):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            self.last = x
            return self.fc2(self.act(self.fc1(x)))

    model = Counting(act=nn.ReLU())
    before = set(model.__dict__)
    assert status(fuse(model))["fc1"] == "fused"
    assert set(model.__dict__) - before == {"_fuse_undo"}
    assert model.training
    assert unfuse(model) == 1
    assert set(model.__dict__) == before


class Lora(nn.Module):
    """What PEFT puts in a Linear's place: the Linear is inside it, and something is added to its output."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


Lora.__module__ = "peft.tuners.lora.layer"


def test_peft_wrappers_are_left():
    model = Block()
    model.fc1 = Lora(model.fc1)
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert detail(report, "fc1.base_layer").startswith("is wrapped by PEFT's Lora")
    assert status(report)["norm"] == "fused"
    assert_same(model, reference, torch.randn(4, 6))


class HeldBlock(Mlp):
    """As torch.nn.TransformerEncoderLayer, which holds F.relu."""

    def forward(self, x):
        return self.fc2(self.activate(self.fc1(x)))


@pytest.mark.parametrize("model", [Mlp(act=nn.ReLU()), HeldBlock(F.relu)], ids=lambda m: type(m).__name__)
def test_a_linear_wrapped_after_fuse_is_called_as_it_is(model: Mlp):
    if type(model) is Mlp:
        model = nn.Sequential(model.fc1, model.act)
    x, name = x4(), "0" if isinstance(model, nn.Sequential) else "fc1"
    fuse(model)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(x)
        setattr(copied, name, Lora(copied.get_submodule(name)))
        wrapped = copied(x)
        unfuse(copied)
        torch.testing.assert_close(wrapped, copied(x))
