"""A fused model computes what the unfused one does through every door: its parts alone, changed, patched or hooked. In fp64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import fuse, unfuse
from tests.fuse.doors import (
    MADE,
    FunctionMlp,
    GatedMlp,
    LoRA,
    Mlp,
    activations,
    assert_outcomes,
    assert_same,
    built,
    fused_copy,
    inputs_of,
    is_norm,
    leaves,
    linears,
    on,
    outcome,
    pair,
    put,
    quiet_fuse,
    x4,
)

pytestmark = pytest.mark.filterwarnings("ignore")
every = pytest.mark.parametrize("name", MADE)
with_activations = pytest.mark.parametrize(
    "name", [n for n in MADE if n not in ("function_mlp", "encoder_layer", "decoder_layer")]
)
with_linears = pytest.mark.parametrize("name", [n for n in MADE if n not in ("encoder_layer", "decoder_layer")])


@every
def test_every_leaf_alone(name: str):
    model, fused, _ = pair(name)
    parts = dict(fused.named_modules())
    for part, module, x in leaves(model):
        assert_same(module, parts[part], lambda m, x=x: m(x))


@every
def test_every_part_alone_copied_and_pickled(name: str):
    model, fused, arguments = pair(name)
    parts = dict(fused.named_modules())
    for part, (args, kwargs) in inputs_of(model, on(arguments)).items():
        expected = outcome(model.get_submodule(part), lambda m, a=args, k=kwargs: m(*a, **k))
        small = len(list(parts[part].modules())) <= 8
        copies = [copy.deepcopy(parts[part]), pickle.loads(pickle.dumps(parts[part]))] if small else []
        for got in (parts[part], *copies):
            assert_outcomes(outcome(got, lambda m, a=args, k=kwargs: m(*a, **k)), expected)


@every
def test_classes_keep_their_names(name: str):
    model, fused, _ = pair(name)
    for (part, a), b in zip(model.named_modules(), fused.modules(), strict=True):
        assert isinstance(b, type(a)), part
        if not is_norm(a):
            assert type(b).__name__ == type(a).__name__, part
        if part in (*linears(model), *activations(model)):
            assert type(b) is type(a), part
            assert set(vars(b)) == set(vars(a)), part
    for part, module in model.named_modules():
        functions = {k: v for k, v in vars(module).items() if callable(v)}
        assert functions == {k: v for k, v in vars(fused.get_submodule(part)).items() if k in functions}, part


class OtherMethods(Mlp):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.fc1(x))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))

    def third(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc1(x) + self.act(x)

    def fourth(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Grandparent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Mlp()
        self.gated = GatedMlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.child(x) + self.child.fc1(x) + self.child.act(self.child.fc2(x))
        return self.gated(x) + self.gated.gate(x) * self.gated.act(x) + self.gated.down(x)


def test_other_methods_and_a_grandparent():
    model = OtherMethods().double()
    fused = fused_copy(model)
    for method in ("first", "second", "third", "fourth", "forward"):
        assert_same(model, fused, lambda m, method=method: getattr(m, method)(x4()))
    model = Grandparent().double()
    assert_same(model, fused_copy(model), lambda m: m(x4()))


def _linear(seed: float) -> nn.Linear:
    linear = nn.Linear(4, 4).double()
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-seed, seed, 16).reshape(4, 4).cos())
        linear.bias.fill_(seed / 4)
    return linear


def _changed(change: Callable[[nn.Sequential], Any]) -> Callable[[nn.Sequential], nn.Module]:
    def apply(s: nn.Sequential) -> nn.Module:
        change(s)
        return s

    return apply


SEQUENCES: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "first": lambda s: s[0],
    "second": lambda s: s[1],
    "last": lambda s: s[-1],
    "tail": lambda s: s[1:],
    "head": lambda s: s[:2],
    "one": lambda s: s[:1],
    "stepped": lambda s: s[::2],
    "children": lambda s: nn.Sequential(*list(s.children())[1:]),
    "rebuilt": lambda s: nn.Sequential(*s),
    "reversed": lambda s: nn.Sequential(*reversed(list(s))),
    "modules list": lambda s: nn.Sequential(*nn.ModuleList(s)[:3]),
    "added": lambda s: s[:2] + s[2:],
    "times": lambda s: s[:2] * 2,
    "nested": lambda s: nn.Sequential(s[:1], s[1:3], nn.Sequential(s[3])),
    "del activation": _changed(lambda s: s.__delitem__(1)),
    "del linear": _changed(lambda s: s.__delitem__(2)),
    "del slice": _changed(lambda s: s.__delitem__(slice(1, 3))),
    "insert": _changed(lambda s: s.insert(1, nn.Tanh())),
    "append": _changed(lambda s: s.append(nn.ReLU())),
    "extend": _changed(lambda s: s.extend([_linear(3), nn.Sigmoid()])),
    "pop": _changed(lambda s: s.pop(1)),
    "set activation": _changed(lambda s: s.__setitem__(1, nn.Tanh())),
    "set linear": _changed(lambda s: s.__setitem__(0, _linear(2))),
    "set attribute": _changed(lambda s: setattr(s, "1", nn.Identity())),
    "add_module": _changed(lambda s: s.add_module("1", nn.Sigmoid())),
    "in place add": _changed(lambda s: s.__iadd__(nn.Sequential(nn.ReLU()))),
}


@pytest.mark.parametrize("change", SEQUENCES.values(), ids=SEQUENCES)
def test_sequences(change: Callable[[nn.Sequential], nn.Module]):
    model, fused, _ = pair("sequential")
    call = on({"input": x4()})
    assert_same(model, fused, call)
    model, fused = change(model), change(fused)
    call = lambda m: m(x4())  # noqa: E731
    assert_same(model, fused, call)
    quiet_fuse(fused)
    assert_same(model, fused, call)
    unfuse(fused)
    assert_same(model, fused, call)


def test_iterating_calls_each_as_itself():
    def one_by_one(m: nn.Sequential) -> torch.Tensor:
        x = x4()
        for child in m:
            x = child(x)
        return x

    for nested in (False, True):
        model, _ = built("sequential")
        model = nn.Sequential(model, nn.Sequential(_linear(1)), nn.ReLU()) if nested else model
        fused = fused_copy(model)
        assert_same(model, fused, one_by_one)
        assert_same(model, fused, lambda m: m(x4()))


@with_activations
@pytest.mark.parametrize("other", [nn.Tanh, nn.Identity, lambda: nn.GELU(approximate="tanh"), lambda: nn.Sequential(nn.ReLU())])
def test_a_replaced_activation(name: str, other: Callable[[], nn.Module]):
    model, fused, arguments = pair(name)
    names = activations(model)
    assert names
    for m in (model, fused):
        for part in names:
            put(m, part, other())
    assert_same(model, fused, on(arguments))


@pytest.mark.parametrize("name", ["function_mlp", "encoder_layer", "decoder_layer"])
@pytest.mark.parametrize("other", [F.relu, torch.tanh, lambda x: x * 2, nn.Sigmoid()])
def test_a_replaced_function(name: str, other: Any):
    model, fused, arguments = pair(name)
    for m in (model, fused):
        setattr(m, "act" if name == "function_mlp" else "activation", other)
    assert_same(model, fused, on(arguments))


class Negated(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -super().forward(input)


def _other_linear(old: nn.Module) -> nn.Module:
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.weight.mul_(-0.5)
    return new


def _negated(old: nn.Module) -> nn.Module:
    if type(old).__name__ == "Conv1D":
        return nn.Sequential(old, nn.ReLU())
    new = Negated(old.in_features, old.out_features, old.bias is not None).double()
    new.load_state_dict(old.state_dict())
    return new


def _lora(old: nn.Module) -> nn.Module:
    width, out = old.weight.shape if type(old).__name__ == "Conv1D" else old.weight.shape[::-1]
    return LoRA(old, width, out)


@with_linears
@pytest.mark.parametrize("other", [_other_linear, _negated, _lora])
def test_a_replaced_linear(name: str, other: Callable[[nn.Module], nn.Module]):
    model, fused, arguments = pair(name)
    names = linears(model)
    for m in (model, fused):
        for part in names:
            put(m, part, other(m.get_submodule(part)))
    assert_same(model, fused, on(arguments))


@pytest.mark.parametrize("name", ["mlp", "function_mlp", "gated_mlp", "sequential"])
def test_each_linear_replaced_by_an_identity_or_nothing(name: str):
    for part in linears(built(name)[0]):
        model, fused, arguments = pair(name)
        for m in (model, fused):
            put(m, part, nn.Identity())
        assert_same(model, fused, on(arguments))
        errors = []
        for m in (model, fused):
            put(m, part, None)
            with pytest.raises(TypeError, match="'NoneType' object is not callable") as error:
                m(**arguments)
            errors.append(str(error.value))
            delattr(m.get_submodule(part.rpartition(".")[0]), part.rpartition(".")[2])
        assert errors[0] == errors[1]
        if name != "sequential":
            with pytest.raises(AttributeError) as one:
                model(**arguments)
            with pytest.raises(AttributeError) as two:
                fused(**arguments)
            assert str(one.value) == str(two.value)


@with_linears
def test_other_weights_and_no_bias(name: str):
    model, fused, arguments = pair(name)
    values = {
        k: torch.cos(torch.arange(p.numel(), dtype=p.dtype)).reshape(p.shape)
        for k, p in model.named_parameters(remove_duplicate=False)
    }
    assert_same(model, fused, lambda m: torch.func.functional_call(m, values, (), arguments, tie_weights=False))
    for m in (model, fused):
        for part in linears(m):
            linear = m.get_submodule(part)
            linear.weight = nn.Parameter(values[f"{part}.weight"].clone())
            if isinstance(linear, nn.Linear):
                linear.bias = None
    assert_same(model, fused, on(arguments))


@every
def test_a_part_unfused_leaves_the_rest(name: str):
    model, _ = built(name)
    types_before = [type(m) for m in model.modules()]
    picks = [*activations(model)[:1], *linears(model)[-2:]]
    picks += [p.rpartition(".")[0] for p in picks] + [p.rpartition(".")[0].rpartition(".")[0] for p in picks]
    for part in dict.fromkeys(picks):
        model, fused, arguments = pair(name)
        unfuse(fused.get_submodule(part))
        inner = zip(model.get_submodule(part).modules(), fused.get_submodule(part).modules(), strict=True)
        assert [type(a) for a, _ in inner if not is_norm(a)] == [
            type(m) for m in model.get_submodule(part).modules() if not is_norm(m)
        ]
        assert_same(model, fused, on(arguments), modes=(True,))
        unfuse(fused)
        assert [type(m) for m in fused.modules()] == types_before


@every
def test_fused_within_fused(name: str):
    model, arguments = built(name)
    part = next(p for p in (*activations(model), *linears(model))).rpartition(".")[0]
    fused = copy.deepcopy(model)
    quiet_fuse(fused.get_submodule(part))
    quiet_fuse(fused)
    assert_same(model, fused, on(arguments))
    outer = nn.ModuleDict({"a": fused, "b": Mlp().double()})
    quiet_fuse(outer)
    assert_same(model, fused, on(arguments))
    unfuse(outer)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(outcome(fused, on(arguments))[0][1], outcome(model, on(arguments))[0][1])


def test_shared_and_tied():
    def made() -> nn.ModuleDict:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": Mlp(), "b": Mlp(act=nn.ReLU()), "c": FunctionMlp(), "d": GatedMlp()}).double()
        model.b.fc1 = model.a.fc1
        model.c.fc2 = model.a.fc1
        model.d.act = model.b.act
        model.a.fc2.weight = model.a.fc1.weight
        return model

    model = made()
    fused = fused_copy(model)
    assert fused.b.fc1 is fused.a.fc1
    assert fused.d.act is fused.b.act
    assert fused.a.fc2.weight is fused.a.fc1.weight
    assert_same(model, fused, lambda m: [m.a(x4()), m.b(x4()), m.c(x4()), m.d(x4()), m.a.fc1(x4())])
    unfuse(fused.a)
    for m in (model, fused):
        m.b.act = nn.Tanh()
    assert_same(model, fused, lambda m: [m.a(x4()), m.b(x4()), m.c(x4()), m.d(x4()), m.a.fc1(x4())])


def test_a_function_does_not_take_a_modules_place():
    model = Mlp()
    fuse(model)
    with pytest.raises(TypeError, match="cannot assign"):
        model.act = F.relu
