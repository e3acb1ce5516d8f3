"""Forwards of every form: activations as functions and methods, several methods, branches, loops; and what runs when a call differs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import fuse, unfuse
from tests.fuse.test_fuse import assert_same, detail, fused_calls, status
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


@by_name
def test_functional_activations(cls: type[Mlp]):
    model = cls()
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert status(report)["fc1"] == "fused", report.table()
    assert detail(report, "fc1").startswith("with ")
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
        assert detail(fuse(NoInplace()), "fc1").startswith("no activation follows (add does)")


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
    assert fused_calls(model, x4(), x4()) == ["linear_fwd"]

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


def own_method(self, x):
    return self.fc2(F.gelu(self.fc1(self.ready(x))))


def counts(self, x):
    self.counted = getattr(self, "counted", 0) + 1
    return self.fc2(F.gelu(self.fc1(x)))


def loops(self, x):
    for _ in range(2):
        x = self.fc2(F.gelu(self.fc1(x)))
    return x


def prepare(self, x):
    return x + 1


def prints(self, x):
    print("called")
    return self.fc2(F.gelu(self.fc1(x)))


def nested(self, x):
    return (lambda y: self.fc2(F.gelu(self.fc1(y))))(x)


def statements(self, x):
    """A use before and after, of a variable that is assigned twice."""
    hidden = self.fc1(x)
    shape = hidden = F.gelu(hidden)
    hidden = self.fc1(x)
    hidden = F.gelu(hidden)
    out = self.fc2(hidden)
    return out + shape.sum()


def in_place(self, x):
    hidden = self.fc1(x)
    hidden = F.relu(hidden, inplace=True)
    return self.fc2(hidden)


def annotated(self, x: torch.Tensor, *more: torch.Tensor, scale: float = 2.0, **options: int) -> torch.Tensor:
    y: torch.Tensor = F.gelu(self.fc1(x))
    return self.fc2(y) * scale


MORE_THAN_A_GRAPH = [
    branch, global_state, without_grad, type_test, config_object, own_method, counts, loops, prints, nested, statements, in_place,
    annotated,
]  # fmt: skip


def odd(forward) -> Mlp:
    cls = type("Odd", (Mlp,), {"forward": forward, "ready": prepare, "config": {"scale": 2}})
    return cls()


@pytest.mark.parametrize("forward", MORE_THAN_A_GRAPH, ids=lambda f: f.__name__)
def test_whatever_else_a_forward_does_it_goes_on_doing(forward, capsys):
    model = odd(forward)
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert status(report)["fc1"] == "fused", report.table()
    assert "linear_fwd" in fused_calls(model, x4())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x4()), reference(x4()))
    outputs = capsys.readouterr().out.count("called")
    assert outputs == (5 if forward is prints else 0)
    assert unfuse(model) == 1


def shown(y):
    return F.gelu(y)


def used_again(self, x):
    hidden = self.fc1(x)
    y = F.gelu(hidden)
    return self.fc2(y) + hidden.mean()


def changed_between(self, x):
    hidden = self.fc1(x)
    self.fc1.weight.data.mul_(1)
    hidden = F.gelu(hidden)
    return self.fc2(hidden)


def kept_in_a_loop(self, x):
    for _ in range(2):
        hidden = self.fc1(x)
        x = self.fc2(F.gelu(hidden))
        x = x + hidden.mean()
    return x


def seen_by_a_closure(self, x):
    hidden = self.fc1(x)
    y = F.gelu(hidden)
    return self.fc2(y) + (lambda: hidden.mean())()


def looked_at(self, x):
    hidden = self.fc1(x)
    y = F.gelu(hidden)
    return self.fc2(y) + locals()["hidden"].mean()


def one_of_two(self, x):
    hidden = self.fc1(x)
    if x.sum() > 0:
        hidden = F.gelu(hidden)
    return self.fc2(hidden)


def tried(self, x):
    try:
        hidden = self.fc1(x)
        hidden = F.gelu(hidden)
    finally:
        x = x * 2
    return self.fc2(hidden) + x


def own_function(self, x):
    return self.fc2(shown(self.fc1(x)))


@pytest.mark.parametrize(
    "forward",
    [used_again, changed_between, kept_in_a_loop, seen_by_a_closure, looked_at, one_of_two, tried, own_function],
    ids=lambda f: f.__name__,
)
def test_what_reads_the_output_before_the_activation_keeps_it(forward):
    model = odd(forward)
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="nothing was fused"):
        report = fuse(model)
    assert detail(report, "fc1")
    torch.testing.assert_close(model(x4()), reference(x4()))


def test_a_function_without_source_is_said():
    namespace: dict = {"F": F}
    exec("def forward(self, x):\n    return self.fc2(F.gelu(self.fc1(x)))", namespace)
    model = odd(namespace["forward"])
    with pytest.warns(UserWarning, match="nothing was fused"):
        report = fuse(model)
    assert detail(report, "fc1") == "Odd.forward has no source to read (made by exec, or in an interactive session)"


def test_a_decorated_forward_is_looked_through():
    class Decorated(Mlp):
        @torch.no_grad()
        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    model = Decorated()
    reference = copy.deepcopy(model)
    assert status(fuse(model))["fc1"] == "fused"
    assert fused_calls(model, x4()) == ["linear_fwd"]
    torch.testing.assert_close(model(x4()), reference(x4()))
    assert not model(x4()).requires_grad


def test_super_and_private_names_reach_what_they_reached():
    class Private(Functional):
        def __init__(self):
            super().__init__()
            self.__scale = 3.0

        def forward(self, x):
            return F.gelu(self.fc1(x)).sum() * self.__scale + super().forward(x)

    model = Private().eval()
    reference = copy.deepcopy(model)
    assert status(fuse(model))["fc1"] == "fused"
    torch.testing.assert_close(model(x4()), reference(x4()))
