"""Forwards replaced by their traced graph: activations called as functions, gates, MLPs; and when the original must run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import fuse, unfuse
from tests.fuse.test_fuse import assert_same, detail, status
from tests.fuse.test_matching import Mlp, x4


class Functional(Mlp):
    def forward(self, x):
        return self.fc2(F.dropout(F.gelu(self.fc1(x)), 0.5, self.training))


class Method(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Approximate(Mlp):
    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Torch(Mlp):
    def forward(self, x):
        return torch.tanh(self.fc2(torch.sigmoid(self.fc1(x)).reshape(x.shape[0], -1)))


class Scaled(Mlp):
    """Reads a Python number of its own."""

    scale = 2.0

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.scale)


class WithOptional(Mlp):
    def forward(self, x, residual=None):
        x = self.fc2(F.relu(self.fc1(x)))
        if residual is not None:
            x = x + residual
        return x


class OwnMethods(Mlp):
    """forward calls methods of its own, which are looked into as well."""

    def forward(self, x):
        return self.second(self.first(x))

    def first(self, x):
        return F.gelu(self.fc1(x))

    def second(self, x):
        return self.fc2(x)


class NoInplace(Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x) + 1))


FORMS = [Functional, Method, Approximate, Torch, Scaled, WithOptional, OwnMethods]
by_name = pytest.mark.parametrize("cls", FORMS, ids=lambda c: c.__name__)


def fused_calls(model: nn.Module, *args, **kwargs) -> list[str]:
    """The fused functions that one call of model in evaluation runs, by the names of their raw operators."""
    model.eval()
    with torch.profiler.profile() as profile, torch.no_grad():
        model(*args, **kwargs)
    return [e.name.removeprefix("fused_ops::") for e in profile.events() if e.name.startswith("fused_ops::")]


@by_name
def test_functional_activations(cls: type[Mlp]):
    model = cls()
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert status(report)["fc1"] == "fused", report.table()
    assert "called as a function" in detail(report, "fc1")
    assert isinstance(model, cls)
    assert "linear_fwd" in fused_calls(model, x4())
    assert_same(model, reference, x4())
    assert {c.status for c in fuse(model) if c.name == "fc1"} == {"already fused"}
    unfuse(model)
    assert type(model) is cls
    assert set(model.__dict__) == set(reference.__dict__)
    assert fused_calls(model, x4()) == []


def test_an_activation_of_something_else_is_no_match():
    with pytest.warns(UserWarning, match="nothing was fused"):
        assert detail(fuse(NoInplace()), "fc1") == "no activation follows (add does)"


@by_name
def test_copies_stay_fused(cls: type[Mlp]):
    model = cls()
    reference = copy.deepcopy(model)
    fuse(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "linear_fwd" in fused_calls(copied, x4())
        assert_same(copied, reference, x4())
        unfuse(copied)
        assert type(copied) is cls


@by_name
def test_compile_and_export(cls: type[Mlp]):
    model = cls().double()
    reference = copy.deepcopy(model).eval()
    fuse(model)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x4().double()), reference(x4().double()))
    program = torch.export.export(model, (x4().double(),))
    assert "fused_ops.linear_fwd" in str(program.run_decompositions({}).graph)
    torch.testing.assert_close(program.module()(x4().double()), reference(x4().double()))


def test_keywords_reach_the_graph():
    model = WithOptional()
    fuse(model)
    assert fused_calls(model, x=x4()) == ["linear_fwd"]


def test_the_original_forward_runs_where_the_graph_does_not_hold():
    model = WithOptional()
    reference = copy.deepcopy(model)
    fuse(model)
    torch.testing.assert_close(model(x4(), residual=x4()), reference(x4(), residual=x4()))
    assert fused_calls(model, x4(), x4()) == []

    scaled = Scaled()
    reference = copy.deepcopy(scaled)
    fuse(scaled)
    scaled.scale = reference.scale = 3.0
    torch.testing.assert_close(scaled(x4()), reference(x4()))

    hooked = Functional().eval()
    fuse(hooked)
    seen = []
    hooked.fc1.register_forward_hook(lambda m, args, out: seen.append(out))
    hooked(x4())
    assert len(seen) == 1

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    wrapped = Functional().eval()
    fuse(wrapped)
    wrapped.fc1 = Wrapped(wrapped.fc1)  # as PEFT does
    torch.testing.assert_close(wrapped(x4()), wrapped.fc2(F.gelu(wrapped.fc1(x4()))))


def branch(self, x):
    hidden = F.gelu(self.fc1(x))
    return self.fc2(hidden) if x.sum() > 0 else self.fc2(hidden) * 2


def gelu(x):
    """Not torch's: its name alone must not let it pass."""
    print("called")
    return F.gelu(x)


def own_gelu(self, x):
    return self.fc2(F.gelu(self.fc1(gelu(x))))


def global_state(self, x):
    return self.fc2(F.gelu(self.fc1(x))) * (2 if torch.is_grad_enabled() else 1)


def without_grad(self, x):
    with torch.no_grad():
        return self.fc2(F.gelu(self.fc1(x)))


def type_test(self, x):
    x = x[0] if isinstance(x, list) else x
    return self.fc2(F.gelu(self.fc1(x)))


def config_object(self, x):
    return self.fc2(F.gelu(self.fc1(x))) * self.config["scale"]


def nested(self, x):
    return (lambda y: self.fc2(F.gelu(y)))(self.fc1(x))


def own_method(self, x):
    return self.fc2(F.gelu(self.fc1(self.ready(x))))


def counts(self, x):
    self.config = 3
    return self.fc2(F.gelu(self.fc1(x)))


def loops(self, x):
    for _ in range(2):
        x = self.fc2(F.gelu(self.fc1(x)))
    return x


def prepare(self, x):
    print("called")
    return x + 1


def prints(self, x):
    print("called")
    return self.fc2(F.gelu(self.fc1(x)))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (branch, "forward branches on a tensor"),
        (global_state, "forward uses is_grad_enabled"),
        (without_grad, "forward uses no_grad"),
        (type_test, "forward uses isinstance"),
        (config_object, "forward uses config"),
        (nested, "forward has a nested function or a closure"),
        (own_method, "forward uses print"),
        (own_gelu, "forward uses gelu"),
        (loops, "forward uses range"),
        (counts, "forward writes or imports config"),
        (prints, "forward uses print"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_forwards_that_are_more_than_a_graph_are_left(forward, reason: str):
    cls = type("Odd", (Mlp,), {"forward": forward, "ready": prepare, "config": {"scale": 2}})
    model = cls()
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="nothing was fused"):
        report = fuse(model)
    assert detail(report, "fc1") == f"Odd.forward cannot be replaced by its graph: {reason}"
    assert type(model) is cls
    torch.testing.assert_close(model(x4()), reference(x4()))
