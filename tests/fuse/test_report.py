"""The report is complete and true: a row for everything that could be fused, with the reason that holds, and counts that agree."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops import FuseReport, fuse
from tests.fuse.models import MODELS
from tests.fuse.test_fuse import fused_calls

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(report: FuseReport, op: str) -> dict[str, str]:
    """name -> detail of the rows of an op that are not fused."""
    return {c.name: c.detail for c in report.skipped if c.op == op}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"torch_encoder"}))
def test_the_report_counts_what_runs(name: str) -> None:
    """coverage() by the report's rows is coverage(...) by the operators of one forward, before fuse and after."""
    model, arguments = MODELS[name](2)
    model.eval()
    before = fuse(copy.deepcopy(model), ops=["bare_linear"]).coverage(**arguments)
    report = fuse(model)
    said, counted = report.coverage(), report.coverage(**arguments)
    assert said == counted
    assert {op: total for op, (_, total) in before.items()} == {op: total for op, (_, total) in counted.items()}
    assert sum(done for done, _ in counted.values()) > 0
    assert sum(done for done, _ in before.values()) == 0


def test_torchs_own_fast_path_is_counted_as_what_it_is() -> None:
    """In evaluation without gradients torch's encoder layer calls no module: the count with inputs shows it."""
    model, arguments = MODELS["torch_encoder"](2)
    report = fuse(model.eval())
    assert report.coverage()["layer_norm"] == (5, 5)
    assert report.coverage(**arguments)["layer_norm"] == (1, 5)
    model.train()
    assert report.coverage(**arguments)["layer_norm"] == (5, 5)


class Packed(nn.Module):
    """Phi-3's MLP: one Linear holds the gate and its other half."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(4, 16)
        self.act = nn.SiLU()
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Experts(nn.Module):
    """Mixtral's: the experts' weights are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 8))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = F.linear(self.act(F.linear(x, self.up[i])), self.down[i])
        return x


class Everything(nn.Module):
    """One of each thing that fuse has no op for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.batch = nn.BatchNorm1d(4)
        self.group = nn.GroupNorm(2, 4)
        self.act = nn.Mish()
        self.fc = nn.Linear(4, 4)
        self.packed = Packed()
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.log = nn.LogSoftmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x.mT)).mT
        x = self.norm(x + y)
        x = self.act(self.fc(x)) + self.packed(x) + self.experts(x)
        x = self.group(self.batch(x.mT)).mT
        x, _ = self.attention(x, x, x)
        return self.log(F.log_softmax(x, dim=-1))


def test_what_has_no_op_has_a_row_with_its_reason() -> None:
    model = Everything().eval()
    reference = copy.deepcopy(model)
    report = fuse(model)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(model(x), reference(x))
    assert rows(report, "activation")[""].startswith(
        "relu of Conv1d's output in Everything.forward: no Linear is seen before it"
    )
    assert rows(report, "linear")["fc"] == "no activation of fused_linear's follows (Mish does)"
    assert rows(report, "linear")["packed.both"].startswith("a packed gate (one Linear holds both halves)")
    assert rows(report, "gated_linear")["packed"].startswith("a packed gate")
    assert rows(report, "gated_linear")["experts"] == (
        "experts with 3-D weights (up, down): fused_ops has no product over experts yet"
    )
    assert rows(report, "add_norm")["norm"].startswith("norm of a sum in Everything")
    assert set(rows(report, "norm")) == {"batch", "group"}
    assert set(rows(report, "softmax")) == {"attention"}
    assert set(rows(report, "softmax of another kind")) == {"", "log"}
    assert [c.name for c in report.fused] == ["norm"]
    assert all(c.detail for c in report)
    assert {c.name for c in report} >= {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm))}


class Softmaxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1) + F.softmax(x, dim=0, dtype=torch.float64) + torch.softmax(x, 1) + nn.Softmax(dim=-1)(x)


def attention_weights(scores: Tensor) -> Tensor:
    return nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


class InAFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function = None

    def forward(self, x: Tensor) -> Tensor:
        chosen = attention_weights if self.function is None else self.function
        return chosen(x)


@pytest.mark.parametrize(("cls", "number"), [(Softmaxes, 4), (InAFunction, 1)], ids=["called", "in a function of its file"])
def test_softmax_is_fused_however_it_is_called(cls: type[nn.Module], number: int) -> None:
    model = cls()
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert report.counts()["softmax"] == (number, number)
    x = torch.randn(3, 4)
    assert fused_calls(model, x) == ["softmax_fwd"] * number
    torch.testing.assert_close(model(x), reference(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), reference(x))


def test_a_function_of_the_file_that_is_another_by_then_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = InAFunction()
    fuse(model)
    monkeypatch.setitem(InAFunction.forward.__globals__, "attention_weights", lambda scores: scores * 2)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), x * 2)


class Refused(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, **self.options)


@pytest.mark.parametrize("options", [{"dim": 5}, {"dim": "last"}, {"axis": 0}, {"dim": 0, "dtype": torch.int64}], ids=str)
def test_what_torch_refuses_is_refused_alike(options: dict) -> None:
    model = Refused(**options)
    with pytest.raises(Exception) as expected:
        model(torch.ones(2))
    report = fuse(model)
    assert report.counts()["softmax"] == (1, 1)
    with pytest.raises(expected.type):
        model(torch.ones(2))


def test_integers_go_to_torch() -> None:
    model = Refused(dim=0, dtype=torch.float32)
    x = torch.arange(3)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)


def test_a_branch_that_is_off_does_not_count() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flash = True
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.flash:
                return F.relu(self.fc(x))
            return torch.softmax(x, -1)

    model = Switched()
    report = fuse(model)
    assert report.coverage()["softmax"] == (0, 0)
    assert report.coverage() == report.coverage(torch.ones(2, 4))
    model.flash = False
    assert fused_calls(model, torch.ones(2, 4)) == ["softmax_fwd"]
