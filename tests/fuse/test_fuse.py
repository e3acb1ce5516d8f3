"""fuse(model): what it promises about any model, on small hand-made ones. CPU tensors, so ATen computes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from fused_ops import fuse, unfuse
from fused_ops._fuse import calls as fused_calls_of_forwards
from fused_ops.nn import FusedLayerNorm, FusedSoftmax


class Block(nn.Module):
    """A pre-norm MLP block whose activation is a module."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 10)
        self.act = nn.GELU() if activation is None else activation
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(self.norm(x)))))


def grads(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # the same dropout mask in both
    model(x).square().sum().backward()
    return [x.grad, *[p.grad.clone() for p in model.parameters()]]


def assert_same(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> None:
    """Outputs and gradients, in evaluation and in training."""
    for training in (False, True):
        model.train(training)
        reference.train(training)
        for got, expected in zip(grads(model, x), grads(reference, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def detail(report, name: str) -> str:
    return next(c.detail for c in report if c.name == name)


def status(report, *ops: str) -> dict[str, str]:
    """name -> status of single modules, or of the candidates for ops."""
    return {c.name: c.status for c in report if c.op in (ops or ("layer_norm", "rms_norm", "softmax", "linear"))}


def fused_calls(model: nn.Module, *args, **kwargs) -> list[str]:
    """The fused functions that one call of model in evaluation runs, by the names of their raw operators."""
    model.eval()
    with torch.profiler.profile() as profile, torch.no_grad():
        model(*args, **kwargs)
    return [e.name.removeprefix("fused_ops::") for e in profile.events() if e.name.startswith("fused_ops::")]


def test_fuse_changes_classes_and_nothing_else():
    model = Block()
    reference = copy.deepcopy(model)
    before = {id(p) for p in model.parameters()}
    keys = list(model.state_dict())
    report = fuse(model)
    assert status(report) == {"norm": "fused", "fc1": "fused", "fc2": "not fused"}
    assert isinstance(model.norm, FusedLayerNorm)
    assert type(model.fc1) is nn.Linear
    assert type(model.act) is nn.GELU
    assert isinstance(model, Block)
    assert type(model).__name__ == "Block"
    assert repr(model).startswith("FusedBlock(")
    assert {id(p) for p in model.parameters()} == before
    assert list(model.state_dict()) == keys
    assert_same(model, reference, torch.randn(4, 6))


def test_fused_modules_really_run_the_fused_functions(monkeypatch):
    import fused_ops.nn

    calls = []
    for module, name in ((fused_ops.nn, "fused_layernorm"), (fused_calls_of_forwards, "fused_linear")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: calls.append((name, a[-1])) or real(*a))
    model = Block()
    fuse(model)
    model(torch.randn(2, 6))
    assert calls == [("fused_layernorm", 1e-5), ("fused_linear", "gelu")]


def test_fuse_twice_is_fuse_once_and_unfuse_undoes_it():
    model = nn.Sequential(Block(), Block(nn.ReLU(inplace=True)), nn.Softmax(dim=-1))
    reference = copy.deepcopy(model)
    first = fuse(model)
    types = [type(m) for m in model.modules()]
    again = fuse(model)
    assert [type(m) for m in model.modules()] == types
    assert [(c.name, c.op) for c in again.fused] == [(c.name, c.op) for c in first.fused]
    assert {c.status for c in again.fused} == {"already fused"}
    assert unfuse(model) == 5  # two blocks, their norms, and the softmax
    assert unfuse(model) == 0
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert [set(m.__dict__) for m in model.modules()] == [set(m.__dict__) for m in reference.modules()]


def test_context_manager_undoes_only_its_own_fuse():
    model = Block()
    fuse(model, ops=["layer_norm"])
    with fuse(model) as report:
        assert status(report)["fc1"] == "fused"
        assert type(model) is not Block
    assert type(model) is Block
    assert isinstance(model.norm, FusedLayerNorm)


def test_pickle_and_deepcopy_keep_it_fused_and_undoable():
    model = Block()
    x = torch.randn(3, 6)
    model.eval()
    expected = model(x)
    fuse(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        torch.testing.assert_close(copied(x), expected)
        unfuse(copied)
        assert type(copied) is Block
        assert torch.equal(copied(x), expected)


def test_state_dict_goes_both_ways():
    unfused, other = Block().eval(), Block().eval()
    x = torch.randn(3, 6)
    fuse(other)
    other.load_state_dict(unfused.state_dict(), strict=True)
    torch.testing.assert_close(other(x), unfused(x))
    unfused.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(other(x), unfused(x))


def test_ops_and_filter_fn_choose():
    model = Block()
    assert status(fuse(model, ops=["layer_norm"])) == {"norm": "fused", "fc1": "not fused", "fc2": "not fused"}
    unfuse(model)
    seen = []
    report = fuse(model, filter_fn=lambda name, module: seen.append((name, type(module))) or name != "norm")
    assert status(report) == {"norm": "not fused", "fc1": "fused", "fc2": "not fused"}
    assert detail(report, "norm") == "left out by filter_fn"
    assert seen == [("norm", nn.LayerNorm), ("fc1", nn.Linear), ("fc2", nn.Linear)]
    unfuse(model)
    report = fuse(model, ops=["bare_linear"])
    assert status(report) == {"norm": "not fused", "fc1": "fused", "fc2": "fused"}
    assert model.fc1.activation is None
    assert type(model) is Block


def test_filter_fn_that_raises_leaves_the_model_alone():
    model = Block()

    def bad(name: str, module: nn.Module) -> bool:
        if name == "fc2":
            raise KeyError("no")
        return True

    with pytest.raises(KeyError, match="no"):
        fuse(model, filter_fn=bad)
    assert type(model.norm) is nn.LayerNorm


def test_nothing_fused_warns_or_raises():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    with pytest.warns(UserWarning, match=r"nothing was fused in Sequential[\s\S]*no activation"):
        fuse(model)
    with pytest.raises(RuntimeError, match="nothing was fused"):
        fuse(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(Block(), strict=True)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"fuse: model: got function"):
        fuse(lambda x: x)
    with pytest.raises(ValueError, match=r"ops: got 'norm', allowed: 'layer_norm'"):
        fuse(Block(), ops=["norm"])
    with pytest.raises(TypeError, match=r"ops: got the string 'linear'"):
        fuse(Block(), ops="linear")
    with pytest.raises(TypeError, match=r"filter_fn: got int"):
        fuse(Block(), filter_fn=3)
    with pytest.raises(TypeError, match=r"unfuse: model: got str"):
        unfuse("model")


def test_the_model_itself_may_be_the_module():
    model = nn.LayerNorm(4)
    assert status(fuse(model)) == {"": "fused"}
    assert isinstance(model, FusedLayerNorm)
    model = nn.Softmax(dim=1)
    fuse(model)
    assert isinstance(model, FusedSoftmax)


def test_the_report_prints_as_a_table():
    model = nn.Sequential(Block(), Block())
    report = fuse(model)
    text = str(report)
    assert text.startswith("Sequential: ")
    assert "*.norm x2" in text
    assert "no activation follows" in text
    assert "0.norm" in report.table(every=True)
    assert "1.norm" in report.table(every=True)
    assert len(report.fused) + len(report.skipped) == len(report) == len(list(report))

    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    assert "FusedLayerNorm" in console.export_text()


def test_moves_and_casts_as_before():
    model = Block().eval()
    reference = copy.deepcopy(model)
    fuse(model)
    for change in (
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.requires_grad_(False),
    ):
        x = torch.randn(3, 6)
        got, expected = change(model), change(reference)
        dtype = next(got.parameters()).dtype
        torch.testing.assert_close(got(x.to(dtype)), expected(x.to(dtype)))
    assert not model.fc1.training
    assert model.train().fc1.training


def test_functional_call_and_checkpoint():
    from torch.func import functional_call
    from torch.utils.checkpoint import checkpoint

    model = Block().eval()
    x = torch.randn(3, 6)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = functional_call(model, other, (x,))
    unfused = grads(model, x)
    fuse(model)
    torch.testing.assert_close(functional_call(model, other, (x,)), expected)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for p, expected in zip(model.parameters(), unfused[1:], strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-6)
