"""What a Linear or a norm reads may be computed, put aside or replaced after fuse: what it computes then is what counts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_ops import fuse
from tests.fuse.doors import assert_fuses_linears, assert_same, x4
from tests.fuse.norm_modules import WeightUp
from tests.fuse.test_fuse import fused_calls

pytestmark = pytest.mark.filterwarnings("ignore")


class Every(nn.Module):
    """A Linear wherever a fused call takes one: with an activation, in a gate, in an MLP, among neighbours, as a Conv1D."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.alone, self.gate, self.up, self.fc1, self.fc2 = (nn.Linear(4, 4) for _ in range(5))
        self.conv = Conv1D(4, 4)
        self.act = nn.GELU()
        self.row = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.alone(x)) + self.act(self.gate(x)) * self.up(x)
        return y + self.fc2(self.act(self.fc1(x))) + self.act(self.conv(x)) + self.row(x)


LINEARS = ["alone", "gate", "up", "fc1", "fc2", "conv", "row.0", "row.2"]


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


def _computed(linear: nn.Module, name: str) -> None:
    parametrize.register_parametrization(linear, name, Doubled())


def _an_attribute(linear: nn.Module, name: str) -> None:
    """As torch's old weight norm and DataParallel's replicas have it: a tensor, and no parameter."""
    tensor = getattr(linear, name).detach() * 3
    delattr(linear, name)
    linear.__dict__[name] = tensor


def _a_property(linear: nn.Module, name: str) -> None:
    """A subclass that scales what it holds."""
    scaled = property(lambda self: self._parameters[name] * 4)
    linear.__class__ = type("Scaled", (type(linear),), {name: scaled})


def _a_buffer(linear: nn.Module, name: str) -> None:
    tensor = getattr(linear, name).detach() * 5
    delattr(linear, name)
    linear.register_buffer(name, tensor)


def _none(linear: nn.Module, name: str) -> None:
    linear.register_parameter("bias", None)


CHANGES: list[Callable[[nn.Module, str], None]] = [_computed, _an_attribute, _a_property, _a_buffer, _none]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_a_linear_reads_is_what_is_computed(change: Callable[[nn.Module, str], None], name: str) -> None:
    torch.manual_seed(4)
    model = Every().double()
    nn.init.normal_(model.conv.bias)
    for part in LINEARS:
        changed, fused = copy.deepcopy(model), copy.deepcopy(model)
        assert_fuses_linears(fuse(fused))
        if change is _none and part == "conv":  # its own forward needs a bias
            continue
        change(changed.get_submodule(part), name)
        change(fused.get_submodule(part), name)
        assert_same(changed, fused, lambda m: m(x4()))


@pytest.mark.parametrize("where", ["class", "instance", "neither"])
def test_a_helper_of_a_norm_that_is_another_by_then_is_called(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm is told by what its methods compute: one that is replaced later counts."""
    model = nn.Sequential(WeightUp(4, with_scale=True))
    assert [c.status for c in fuse(model)] == ["fused"]
    x = x4().float()
    if where == "class":
        monkeypatch.setattr(WeightUp, "_norm", lambda self, x: x * 3)
    elif where == "instance":
        monkeypatch.setitem(model[0].__dict__, "_norm", lambda x: x * 3)
    changed = torch.allclose(model(x), x * 3)
    assert changed is (where != "neither")
    assert ("rms_norm_fwd" in fused_calls(model, x)) is (where == "neither")
