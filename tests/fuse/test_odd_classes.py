"""Classes that do not take a subclass, a copy or a second reading of their weights for granted."""

from __future__ import annotations

import abc
import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import FuseReport, fuse, unfuse
from tests.fuse.doors import assert_fuses_linears, x4

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing was fused")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.SiLU()

    def forward(self, x):
        return self.act(self.gate(x)) * self.up(x)


class Registry(type):
    """Keeps its classes by name, and wants a keyword of each."""

    classes: dict[str, type] = {}  # noqa: RUF012

    def __new__(mcs, name, bases, members, *, tag):
        cls = super().__new__(mcs, name, bases, members)
        Registry.classes[name] = cls
        return cls

    def __init__(cls, name, bases, members, *, tag):
        super().__init__(name, bases, members)


class Registered(Pair, metaclass=Registry, tag=1):
    pass


class Abstract(Pair, abc.ABC):
    pass


class OtherAbstract(abc.ABC):  # noqa: B024
    pass


class TellsSubclasses(Pair):
    told: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, *, need, **options):
        super().__init_subclass__(**options)
        TellsSubclasses.told.append(cls)


class Slots(Pair):
    __slots__ = ("slot",)


class Item(Pair):
    def __class_getitem__(cls, item):
        return cls


@dataclasses.dataclass(eq=False)
class Data(nn.Module):
    width: int = 4

    def __post_init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, self.width), nn.ReLU()

    def forward(self, x):
        return self.act(self.fc(x))


class _Private(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__fc, self.__act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.__act(self.__fc(x))


class Counting(Pair):
    def __getattr__(self, name):
        self.__dict__.setdefault("asked", []).append(name)
        return super().__getattr__(name)


class WrongBias(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.fc1.bias = nn.Parameter(torch.ones(5))


def twins(module: nn.Module) -> tuple[nn.Module, nn.Module, FuseReport]:
    model = module.double()
    fused = copy.deepcopy(model)
    return model, fused, fuse(fused)


CLASSES = (Registered, Abstract, TellsSubclasses, Slots, Item, Data, _Private, Counting)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fused_like_any_other(cls: type[nn.Module]):
    model, fused, report = twins(cls())
    assert_fuses_linears(report)
    for m in (model, fused):
        m.__dict__.pop("asked", None)
    torch.testing.assert_close(fused(x4()), model(x4()))
    assert vars(fused).get("asked") == vars(model).get("asked")
    assert unfuse(fused) == 1
    assert type(fused) is cls


def test_nobody_is_told_of_the_class():
    twins(Registered())
    twins(TellsSubclasses())
    assert Registry.classes == {"Registered": Registered}
    assert TellsSubclasses.told == []


def test_an_abstract_class_keeps_its_own_registrations():
    model, fused, _ = twins(Abstract())
    type(fused).register(OtherAbstract)
    assert isinstance(model, Abstract)
    assert not isinstance(model, type(fused))
    assert isinstance(fused, Abstract)


def factory(act: Any, scale: float) -> nn.Module:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, k=scale):
            return act(self.fc(x)) * k

    return Made()


def test_classes_that_share_their_code_keep_their_closures_and_defaults():
    model, fused, report = twins(nn.Sequential(*(factory(act, k) for k, act in enumerate((F.relu, torch.cos, nn.SiLU()), 2))))
    assert report.counts()["linear"] == (2, 3)
    torch.testing.assert_close(fused(x4()), model(x4()))


def test_made_by_the_class_of_a_fused_one():
    _, fused, _ = twins(Pair())
    other = type(fused)().double()
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(other(x4()), fused(x4()))
    assert_fuses_linears(fuse(other))
    assert unfuse(other) == 1
    assert type(other) is Pair


def test_graph_modules_stay_what_they_are():
    model, fused, report = twins(torch.fx.symbolic_trace(Pair()))
    assert not report.fused
    assert any("torch.fx" in c.detail for c in report.skipped)
    for m in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(m(x4()), model(x4()))
    fused.recompile()
    torch.testing.assert_close(fused(x4()), model(x4()))


def test_scripted_and_compiled_parts():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.scripted, self.layer = torch.jit.script(Pair().double()), torch.jit.script(nn.Linear(4, 4).double())
            self.compiled = torch.compile(Pair().double(), backend="eager")
            self.fc, self.act = nn.Linear(4, 4).double(), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(self.act(self.layer(self.compiled(self.scripted(x))))))

    model = Parts()
    expected = model(x4())
    assert_fuses_linears(fuse(model))
    torch.testing.assert_close(model(x4()), expected)


def test_a_lazy_linear_before_and_after_it_has_its_weight():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.LazyLinear(4, dtype=torch.float64), nn.SiLU()

        def forward(self, x):
            return self.act(self.fc(x))

    model, fused = Lazy(), Lazy()
    assert not fuse(fused).fused
    outputs = []
    for m in (model, fused):
        torch.manual_seed(1)
        outputs.append(m(x4()))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert_fuses_linears(fuse(fused))
    torch.testing.assert_close(fused(x4()), model(x4()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_spectral_norm_takes_its_step_once_a_call(when: str):
    torch.manual_seed(0)
    model = Gate().double()
    fused = copy.deepcopy(model)
    if when == "after":
        assert_fuses_linears(fuse(fused))
    for m in (model, fused):
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(m.gate)
        m.up.register_forward_hook(lambda *_: None)
    if when == "before":
        fuse(fused)
    for _ in range(3):
        torch.testing.assert_close(fused(x4()), model(x4()))
    vectors = [m.gate.parametrizations.weight[0]._u for m in (fused, model)]
    torch.testing.assert_close(*vectors)


def test_a_child_with_its_own_way_of_being_called():
    class Louder(nn.GELU):
        def __call__(self, x):
            return super().__call__(x) * 2

    model, fused, _ = twins(Pair())
    for m in (model, fused):
        m.act = Louder()
    torch.testing.assert_close(fused(x4()), model(x4()))


@pytest.mark.parametrize("shape", [(1,), (1, 4), (3, 4), ()], ids=str)
def test_a_bias_of_another_shape(shape: tuple[int, ...]):
    model = Pair()
    model.fc1.bias = nn.Parameter(torch.ones(shape))
    model, fused, _ = twins(model)
    torch.testing.assert_close(fused(x4()), model(x4()))


REFUSED = {
    "width": x4()[..., :3],
    "dtype": x4().float(),
    "integers": torch.ones(3, 4, dtype=torch.long),
    "a number": torch.tensor(1.0, dtype=torch.float64),
    "device": x4().to("meta"),
    "sparse": x4()[..., :3].to_sparse(),
    "a list": [1.0],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("cls", "what"), [*((Pair, what) for what in REFUSED), (WrongBias, "fine")])
def test_what_torch_refuses_is_refused_by_an_error_of_the_same_type(cls: type[nn.Module], what: str, training: bool):
    model, fused, _ = twins(cls())
    errors = []
    for m in (model, fused):
        with torch.set_grad_enabled(training), pytest.raises((RuntimeError, TypeError)) as raised:
            m(REFUSED.get(what, x4()))
        errors.append(type(raised.value))
    assert errors[0] == errors[1]


class CountsOnItsClass(Pair):
    calls = 0

    def forward(self, x):
        self.count()
        return super().forward(x) + self.fc2(self.act(self.fc1(x)))

    def count(self):
        type(self).calls += 1


def test_a_class_that_its_methods_write_to_is_left():
    model = CountsOnItsClass().double()
    with pytest.warns(UserWarning, match=r"CountsOnItsClass\.count asks for the class of its module"):
        fuse(model)
    model(x4())
    assert CountsOnItsClass.calls == 1
    assert type(model) is CountsOnItsClass
