"""Forwards written so that a careless rewrite of their source would compute, raise or record something else."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import fuse
from fused_ops._fuse.flow import Flow
from fused_ops._fuse.sites import sites
from fused_ops._fuse.source import read
from tests.fuse.doors import x4

RECORDED: list[Any] = []
SHARED: Any = 0


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.gate, self.up = (nn.Linear(4, 4) for _ in range(4))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(3, 4)])
        self.act, self.silu = nn.GELU(), nn.SiLU()

    def double_it(self, x: torch.Tensor) -> torch.Tensor:
        RECORDED.append("doubled")
        return x.mul_(2)


class EffectBeforeTheUse(Layers):
    def forward(self, x):
        h = self.fc1(x)
        return self.double_it(x) + self.act(h)


class EffectInADictBeforeTheUse(Layers):
    def forward(self, x):
        h = self.fc1(x)
        return {"a": self.double_it(x), "b": self.act(h)}["b"]


class EffectInTheValueOfASubscript(Layers):
    def forward(self, x):
        values: dict[Any, Any] = {}
        h = self.fc1(x)
        values[self.act(h).sum().item()] = self.double_it(x)
        return torch.tensor(list(values))


class EffectInAKeywordBeforeTheUse(Layers):
    def forward(self, x):
        h = self.fc1(x)
        return torch.add(input=self.double_it(x), other=self.act(h))


class Walrus(Layers):
    def forward(self, x):
        h = self.fc1(x)
        y = (h := x + 1) * 1 + self.act(h)
        return y


class AugmentedByItsOwnActivation(Layers):
    def forward(self, x):
        h = self.fc1(x)
        h += self.act(h)
        return self.fc2(x)


class EvaluatedUnderACondition(Layers):
    def forward(self, x):
        h = self.fc1(x)
        y = 1 < 0 < self.act(h)
        return x * y


class ReadByAHandler(Layers):
    def forward(self, x):
        h = None
        try:
            h = self.fc1(x)
            h = self.act(h)
        except RuntimeError:
            return h
        return h


class SetBeforeTheException(Layers):
    def forward(self, x):
        done = False
        try:
            h = self.fc1(x)
            done = True
            h = self.act(h)
        except RuntimeError:
            RECORDED.append(done)
            raise
        return h


class ReadByFinally(Layers):
    def forward(self, x):
        try:
            h = self.fc1(x)
            y = self.act(h)
            return y
        finally:
            RECORDED.append(h)


class ReadAfterASuppressedException(Layers):
    def forward(self, x):
        h = None
        with contextlib.suppress(RuntimeError):
            h = self.fc1(x)
            h = self.act(h)
        return h


class LoopReadAfterASuppressedException(Layers):
    def forward(self, x):
        with contextlib.suppress(RuntimeError):
            for layer in self.layers:
                x = layer(x)
        return x


class BreakInAWith(Layers):
    def forward(self, x):
        for i in range(2):
            h = self.fc1(x)
            y = self.act(h)
            with contextlib.nullcontext():
                if i == 0:
                    break
            h = y
        return h


class BreakInAMatch(Layers):
    def forward(self, x):
        for i in range(2):
            h = self.fc1(x)
            y = self.act(h)
            match i:
                case 0:
                    break
            h = y
        return h


class BreakInAnElse(Layers):
    def forward(self, x):
        for _ in range(2):
            h = self.fc1(x)
            y = self.act(h)
            for _ in ():
                pass
            else:
                break
            h = y
        return h


class GateOfChangedInputs(Layers):
    def forward(self, x):
        return self.silu(self.gate(x.add_(1))) * self.up(x.add_(1))


class GateOfChangedInputsByStatements(Layers):
    def forward(self, x):
        g = self.gate(x.add_(1))
        u = self.up(x.add_(1))
        return self.silu(g) * u


class LooksAtLocals(Layers):
    def forward(self, x):
        y = self.act(self.fc1(x))
        RECORDED.append(sorted(locals()))
        return y


class WritesAGlobal(Layers):
    def forward(self, x):
        global SHARED
        SHARED = 0
        h = self.fc1(x)
        SHARED = 1
        return self.act(h)


class ComputesBetween(Layers):
    def forward(self, x):
        h = self.fc1(x)
        y = x * 2
        return self.act(h) + y


class NamesItsFunctions(Layers):
    def forward(self, x):
        RECORDED.append((lambda: None).__qualname__)
        return self.act(self.fc1(x))


class AsksItsClass(Layers):
    calls = 0

    def forward(self, x):
        self.__class__.calls += 1
        return self.act(self.fc1(x)) if type(self) is AsksItsClass else x


class SuperOfItsClass(LooksAtLocals):
    def forward(self, x):
        return super(type(self), self).forward(x) + F.relu(self.fc2(x))


class MultipliesInPlace(Layers):
    def forward(self, x):
        h = self.silu(self.gate(x))
        h *= self.up(x)
        return h, x


class UpFirst(Layers):
    def forward(self, x):
        u = self.up(x)
        return self.silu(self.gate(x)).mul(u), x


class UpBetween(Layers):
    def forward(self, x):
        g = self.gate(x)
        u = self.up(x)
        return self.silu(g) * u, x


class UpBetweenAndLeft(Layers):
    def forward(self, x):
        g = self.gate(x)
        return self.up(x) * self.silu(g), x


class ByTorch(Layers):
    def forward(self, x):
        return torch.mul(self.up(x), self.silu(self.gate(x))), x


CASES = [cls for cls in Layers.__subclasses__() if "forward" in vars(cls)] + [SuperOfItsClass]


class ChangesItsInput(nn.Module):
    """Stands in a child's place, records its calls, returns its input itself, changed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RECORDED.append((self.name, x.clone(), SHARED))
        return x.mul_(0.5)


def twins(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = cls().double()
    fused = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fuse(fused)
    return model, fused


def outcome(model: nn.Module, x: torch.Tensor) -> list[Any]:
    RECORDED.clear()
    try:
        result = model(x)
    except Exception as error:
        result = type(error)
    return [result, *RECORDED, x]


def assert_equal(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected):
            assert_equal(a, b)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected)
    else:
        assert got == expected


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_same_results_records_and_exceptions(cls: type[nn.Module]):
    model, fused = twins(cls)
    for x in (x4(), x4()[..., :3], x4().float()):
        assert_equal(outcome(fused, x.clone()), outcome(model, x.clone()))


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_same_with_children_that_change_their_input(cls: type[nn.Module]):
    model, fused = twins(cls)
    for m in (model, fused):
        for name in ("fc1", "gate", "up", "silu"):
            setattr(m, name, ChangesItsInput(name))
    assert_equal(outcome(fused, x4()), outcome(model, x4()))


def test_a_gate_of_another_dtype_stays_in_its_own():
    model, fused = twins(MultipliesInPlace)
    for m in (model, fused):
        m.gate.float().register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    expected = outcome(model, x4())
    assert expected[0][0].dtype is torch.float32
    assert_equal(outcome(fused, x4()), expected)


class Fusable(Layers):
    """Statements that are fused across, each in a way of its own."""

    def in_a_with(self, x):
        with torch.no_grad():
            h = self.fc1(x)
            h = self.act(h)
        return h

    def in_a_try(self, x):
        try:
            h = self.fc1(x)
            h = self.act(h)
            return h
        except RuntimeError:
            return x

    def with_sizes_between(self, x):
        h = self.fc1(x)
        rows, columns = x.shape[0], x.size(-1) // 2
        same = x
        h = self.act(h)
        return h, rows, columns, same

    def in_a_loop(self, x):
        for i in range(3):
            h = self.fc1(x)
            h = self.act(h)
            if i > 1:
                break
            x = x + h
        return x

    def augmented(self, x):
        h = self.silu(self.gate(x))
        h *= self.up(x)
        return h

    def residual(self, x):
        h = self.fc1(x)
        return x + self.act(h)


@pytest.mark.parametrize("name", [name for name in vars(Fusable) if not name.startswith("_")])
def test_what_is_certain_is_fused_across_statements(name: str):
    flow = Flow(read(getattr(Fusable, name)).tree)
    assert [site.op for site in sites(flow) if site.captured]
