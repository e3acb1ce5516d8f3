"""What keeps a Linear from being fused, by kind: every hook that a module can have, and inputs that are another by then."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops import fuse

HOOKS = [
    name for name in dir(nn.Module)
    if name.startswith("register_") and name.endswith("_hook") and ("forward" in name or "backward" in name)
]  # fmt: skip


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8))


@pytest.mark.parametrize("place", [0, 1], ids=["linear", "activation"])
@pytest.mark.parametrize("register", HOOKS)
def test_every_kind_of_hook_is_said(register: str, place: int) -> None:
    assert len(HOOKS) >= 5
    model = _model()
    getattr(model[place], register)(lambda *_: None)
    (row,) = [c for c in fuse(model) if c.name == "0"]
    assert row.status == "not fused"
    kind = register.removeprefix("register_").removesuffix("_hook").removeprefix("full_").replace("_", " ")
    assert f"a {kind.replace(' pre', ' pre-')}{' ' if 'pre' not in kind else ''}hook" in row.detail


class Gate(nn.Module):
    """The two halves read a variable that is another tensor by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, 8), nn.Linear(4, 8)
        self.act = nn.SiLU()


class Renamed(Gate):
    def forward(self, x: Any, y: Any) -> Any:
        hidden = self.act(self.gate(x))
        x = y
        return hidden * self.up(x)


class Swapped(Gate):
    def forward(self, x: Any, y: Any) -> Any:
        hidden = self.gate(x)
        x, y = y, x
        return self.up(x) * self.act(hidden)


@pytest.mark.parametrize("cls", [Renamed, Swapped])
def test_a_gate_of_two_inputs_of_one_name(cls: type[Gate]) -> None:
    model = cls()
    reference = copy.deepcopy(model)
    fuse(model)
    x, y = torch.randn(2, 3, 4)
    torch.testing.assert_close(model(x, y), reference(x, y))
