"""Forwards of every form: what is fused in them is what they say, also after what they read has changed. In fp64."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import unfuse
from tests.fuse.doors import (
    GatedMlp,
    assert_same,
    fused_copy,
    quiet_fuse,
    x4,
)

pytestmark = pytest.mark.filterwarnings("ignore")


class Form(nn.Module):
    """Two linear layers and activations of both kinds; each subclass writes its forward in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)
        self.act = nn.GELU()
        self.into = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.by_name = nn.ModuleDict({"a": nn.Linear(4, 4), "act": nn.SiLU()})
        self.flag, self.scale, self.log = True, 2.0, []


class UsedAgain(Form):
    def forward(self, x):
        h = self.fc1(x)
        y = self.act(h)
        return y + h


class UsedAgainLater(Form):
    def forward(self, x):
        h = self.fc1(x)
        for _ in range(2):
            y = self.act(h)
            h = h + self.fc2(y)
        return h


class InPlaceActivation(Form):
    def forward(self, x):
        h = self.fc1(x)
        y = self.into(h)
        return y + 2 * h


class InPlaceFunction(Form):
    def forward(self, x):
        h = self.fc1(x)
        F.relu_(h)
        return self.fc2(h)


class Walrus(Form):
    def forward(self, x):
        y = self.act(h := self.fc1(x))
        return y * h


class Captured(Form):
    def forward(self, x):
        h = self.fc1(x)
        again = lambda: h * 2  # noqa: E731
        h = self.act(h)
        return again() + h


class CapturedBefore(Form):
    def forward(self, x):
        h = self.fc1(x)

        def again():
            return h

        y = self.act(h)
        return again() - y


class Locals(Form):
    def forward(self, x):
        hidden = self.fc1(x)
        out = self.act(hidden)
        return out + locals()["hidden"]


class Attribute(Form):
    def forward(self, x):
        self.last = self.fc1(x)
        y = self.act(self.last)
        return y + self.last


class Logging(Form):
    def forward(self, x):
        h = self.fc1(x)
        self.log.append(float(h.detach().sum()))
        h = self.act(h)
        return h * self.log[-1]


class Changed(Form):
    def forward(self, x):
        h = self.fc1(x)
        h += 1
        h = self.act(h)
        h = self.fc2(h).mul_(2)
        return F.relu(h)


class Branches(Form):
    def forward(self, x):
        h = self.fc1(x)
        if self.training or x.sum() > 1e9:
            h = self.act(h)
        elif self.flag:
            h = F.silu(h)
        try:
            h = self.fc2(h)
            h = self.act(h) if self.flag else h
        finally:
            self.log.append(1)
        return h


class Loops(Form):
    def forward(self, x):
        for fc in self.layers:
            x = self.act(fc(x))
        while x.abs().max() > 1:
            x = torch.tanh(self.fc1(x)) / 2
        return torch.stack([F.relu(fc(x)) for fc in self.layers]).sum(0) + self.by_name["act"](self.by_name["a"](x))


class Keywords(Form):
    def forward(self, x, *, approximate="tanh", scale=1.5):
        h = self.act(input=self.fc1(input=x))
        return F.gelu(self.fc2(h), approximate=approximate) * scale


class Starred(Form):
    def forward(self, *args, **kwargs):
        return self.act(*[self.fc1(*args, **kwargs)])


class Rebound(Form):
    def forward(self, x):
        act, fc = self.act, self.fc1
        if self.flag:
            act = torch.tanh
        fc2 = fc
        return act(fc2(x)) + act(fc(x))


class Shadowed(Form):
    def forward(self, x):
        self = types.SimpleNamespace(fc1=self.fc2, act=torch.sin, fc2=self.fc1)
        return self.act(self.fc1(x))


class ShadowedName(Form):
    def forward(self, x):
        F = types.SimpleNamespace(gelu=torch.cos)
        return F.gelu(self.fc1(x))


class Order(Form):
    """What is called when shows in the log."""

    def note(self, name, value):
        self.log.append(name)
        return value

    def forward(self, x):
        self.log.clear()
        gated = self.note("act", self.act)(self.note("gate", self.fc1)(self.note("x", x))) * self.note("up", self.fc2)(x)
        return gated * (1 + sum(ord(name[0]) * i for i, name in enumerate(self.log)))


class Super(Walrus):
    def forward(self, x):
        return super().forward(x) + F.silu(self.fc2(super().forward(self.fc1(x))))


class Wrapped(Form):
    def twice(function):  # noqa: N805
        @functools.wraps(function)
        def wrapper(self, x):
            return function(self, function(self, x)) + 1

        return wrapper

    @twice
    def forward(self, x):
        return self.act(self.fc1(x))


class NoGrad(Form):
    @torch.no_grad()
    def frozen(self, x):
        return self.act(self.fc1(x))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.fc2(self.frozen(x)))


class Generator(Form):
    def steps(self, x):
        h = self.fc1(x)
        yield h
        h = self.act(h)
        yield h

    def forward(self, x):
        return torch.stack(list(self.steps(x))).sum(0)


class Property(Form):
    @property
    def hidden(self):
        return self.fc2 if self.flag else self.fc1

    def forward(self, x):
        return self.act(self.hidden(x)) * torch.sigmoid(self.norm(self.hidden(x)))


class Called(Form):
    def __call__(self, x):
        return super().__call__(x) * 3

    def forward(self, x):
        return self.act(self.fc1(x))


class Mangled(Form):
    def __init__(self):
        super().__init__()
        self.__hidden = nn.Linear(4, 4)

    def forward(self, x):
        return self.act(self.__hidden(x)) + self.__class__.__name__.count("M")


class OtherGetattr(Form):
    def __getattr__(self, name):
        if name == "gate":
            return self.fc2
        return super().__getattr__(name)

    def forward(self, x):
        return F.silu(self.gate(x)) * self.fc1(x)


class Other:
    def of(self, x):
        return F.gelu(self.fc1(x)) * 7


Borrowed = type("Borrowed", (Form,), {"forward": Other.of, "__module__": __name__})
Lambda = type("Lambda", (Form,), {"forward": lambda self, x: self.act(self.fc1(x)) + self.scale, "__module__": __name__})
exec("class Executed(Form):\n    def forward(self, x):\n        return self.act(self.fc1(x)) * self.scale\n")
FORMS = [
    *(
        UsedAgain,
        UsedAgainLater,
        InPlaceActivation,
        InPlaceFunction,
        Walrus,
        Captured,
        CapturedBefore,
        Locals,
        Attribute,
        Logging,
    ),
    *(Changed, Branches, Loops, Keywords, Starred, Rebound, Shadowed, ShadowedName, Order, Super, Wrapped, NoGrad, Generator),
    *(Property, Called, Mangled, OtherGetattr, Borrowed, Lambda, globals()["Executed"]),
]


@pytest.mark.parametrize("cls", FORMS, ids=lambda c: c.__name__)
def test_a_forward_of_any_form(cls: type[Form]):
    torch.manual_seed(0)
    model = cls().double()
    fused = copy.deepcopy(model)
    quiet_fuse(fused)
    call = lambda m: m(x4())  # noqa: E731
    assert_same(model, fused, call)
    assert type(fused).__name__ == cls.__name__
    assert fused.log == model.log
    assert_same(model, pickle.loads(pickle.dumps(fused)) if cls is not Attribute else fused, call)
    for change in (
        lambda m: setattr(m, "flag", False),
        lambda m: setattr(m, "act", nn.Tanh()),
        lambda m: setattr(m, "fc1", nn.Sequential(m.fc1, nn.Softplus())),
        lambda m: setattr(m, "scale", -1.0),
    ):
        change(model)
        change(fused)
        assert_same(model, fused, call)
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    assert_same(model, fused, call)


def test_errors_are_the_same():
    model = GatedMlp().double()
    fused = fused_copy(model)
    wrong: list[Any] = [(torch.ones(2, 3).double(),), (x4().float(),), (), (x4(), x4()), ("text",), (None,), (x4().long(),)]
    for args in wrong:
        errors = []
        for m in (model.gate, fused.gate), (model, fused):
            for part in m:
                with pytest.raises(Exception) as error:
                    part(*args)
                errors.append(type(error.value))
        assert errors[0] == errors[1]
        assert errors[2] == errors[3], args
