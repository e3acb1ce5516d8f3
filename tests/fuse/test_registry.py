"""Every op with a torch.nn class of its own: `fuse` puts the fused class in its place, and `unfuse` takes it out again."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_ops
from fused_ops import REGISTRY, fuse, unfuse
from fused_ops.testing import Op

MODULES = [pytest.param(op, id=name) for name, op in REGISTRY.items() if op.module is not None]


def example(op: Op) -> tuple[nn.Module, Tensor]:
    """The op's torch.nn module and input as its example has them: arguments of one name are one."""
    sample = op.example("cpu", torch.float64)
    given = inspect.signature(op.public).bind(*sample.args, **sample.kwargs).arguments
    assert op.module is not None
    known = inspect.signature(op.module.__init__).parameters
    make: Any = op.module
    module = make(**{name: value for name, value in given.items() if name in known and not isinstance(value, Tensor)})
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(given[name])
    return module, given["input"]


def test_there_are_modules() -> None:
    assert {op.values[0].module for op in MODULES} >= {nn.LayerNorm, nn.RMSNorm, nn.Softmax}  # type: ignore[attr-defined]


@pytest.mark.parametrize("op", MODULES)
def test_the_fused_class_takes_the_place_of_torchs(op: Op) -> None:
    model = nn.Sequential(example(op)[0])
    unfused = copy.deepcopy(model)
    report = fuse(model)
    assert [(c.op, c.status) for c in report] == [(op.name, "fused")]
    assert op.module is not None
    name = f"Fused{op.module.__name__}"
    assert name in fused_ops.nn.__all__
    assert isinstance(model[0], getattr(fused_ops.nn, name))
    assert isinstance(model[0], op.module)
    assert type(model[0]).__name__ == op.module.__name__
    assert repr(model[0]).startswith(f"{name}(")
    for name, value in unfused.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert list(model.state_dict()) == list(unfused.state_dict())
    assert unfuse(model) == 1
    assert type(model[0]) is op.module


@pytest.mark.parametrize("op", MODULES)
def test_the_fused_module_runs_the_op(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are torch's, and the public function computed them."""
    module, x = example(op)
    model = nn.Sequential(module)
    results = []
    ran: list[str] = []
    public = op.public

    def spy(*args: Any, **kwargs: Any) -> Any:
        ran.append(op.name)
        return public(*args, **kwargs)

    monkeypatch.setattr(fused_ops.nn, public.__name__, spy)
    for change in (lambda m: m, fuse):
        change(model)
        leaf = x.detach().clone().requires_grad_()
        out = model(leaf)
        results.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])))
    assert ran == [op.name]
    torch.testing.assert_close(results[1], results[0])
