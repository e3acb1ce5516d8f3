"""count(model, args, kwargs): what one forward computes, on modules whose operations are known, and on models before and after fuse."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops import (
    REGISTRY,
    fuse,
    fused_gated_linear,
    fused_layernorm,
    fused_linear,
    fused_mlp,
    fused_rmsnorm,
    fused_softmax,
)
from fused_ops._fuse.count import KINDS, count
from tests.fuse.models import MODELS

N = 8


class Written(nn.Module):
    """The parameters that the functions below use, and one of them as its forward."""

    def __init__(self, function: Callable[[Written, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.fc1, self.fc2, self.both = nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, 2 * N)
        self.weight, self.bias, self.slope = (nn.Parameter(torch.ones(n)) for n in (N, N, 1))
        self.experts = nn.Parameter(torch.randn(3, N, 2 * N))
        self.relu_ = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def counted(function: Callable[[Written, Tensor], Tensor], train: bool = False) -> dict[str, tuple[int, int]]:
    """The kinds that occur in one forward on a (2, 3, N) input."""
    found = count(Written(function).train(train), (torch.randn(2, 3, N),), {})
    assert tuple(found) == KINDS
    return {kind: counts for kind, counts in found.items() if counts[1]}


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: x.relu_(),
    "gelu": F.gelu,
    "gelu of erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_new": _gelu_new,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu in place": lambda x: x.mul_(torch.sigmoid(x)),
    "relu squared": lambda x: F.relu(x).square(),
    "relu times itself": lambda x: F.relu(x) * F.relu(x),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "hardswish": F.hardswish,
    "log sigmoid": F.logsigmoid,
    "clamp": lambda x: x.clamp(min=0),
    "softcap": lambda x: 30 * torch.tanh(x / 30),
    "through a view": lambda x: F.relu(x.flatten(0, 1)),
    "through a cast": lambda x: F.relu(x.double()),
    "of a part": lambda x: F.silu(x[..., : N // 2]),
    "of two parts": lambda x: F.silu(x[..., : N // 2]) + torch.sigmoid(x[..., N // 2 :]),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_an_activation_of_a_product_is_one_linear(activation: Callable[[Tensor], Tensor]) -> None:
    assert counted(lambda m, x: activation(m.fc1(x))) == {"linear": (0, 1)}


PRODUCTS: dict[str, Callable[[Written, Tensor], Tensor]] = {
    "two dimensions": lambda m, x: F.relu(m.fc1(x[0])),
    "no bias": lambda m, x: F.relu(F.linear(x, m.fc1.weight)),
    "a bias added": lambda m, x: F.relu(x @ m.fc1.weight + m.bias),
    "not contiguous": lambda m, x: F.relu(m.fc1(x.transpose(0, 1))),
    "einsum": lambda m, x: F.relu(torch.einsum("bsk,nk->bsn", x, m.fc1.weight)),
    "an expert": lambda m, x: F.relu(x[0] @ m.experts[1]),
    "experts": lambda m, x: F.relu(torch.bmm(x, m.experts[torch.tensor([0, 2])])),
    "prelu": lambda m, x: F.prelu(m.fc1(x), m.slope),
    "a module in place": lambda m, x: m.relu_(m.fc1(x)),
    "a constant input": lambda m, x: x + F.relu(m.fc1(m.weight)),
    "under vmap": lambda m, x: torch.vmap(lambda row: F.relu(m.fc1(row)))(x[0]),
    "two calls of one Linear": lambda m, x: m.fc2(m.fc1(x).relu()),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_with_a_weight_is_found(product: Callable[[Written, Tensor], Tensor]) -> None:
    assert counted(product) == {"linear": (0, 1)}


NOTHING: dict[str, Callable[[Written, Tensor], Tensor]] = {
    "no activation": lambda m, x: m.fc2(m.fc1(x)) * 2,
    "an activation of the input": lambda m, x: m.fc1(F.relu(x)),
    "a product of two computed tensors": lambda m, x: torch.sigmoid(x @ x.transpose(1, 2)),
    "the activation of a sum": lambda m, x: F.relu(m.fc1(x) + m.fc2(x)),
    "a convolution": lambda m, x: F.relu(F.conv1d(x, m.experts[:, :1, :3].transpose(0, 1).expand(3, 3, 3))),
    "log_softmax": lambda m, x: F.log_softmax(x, -1),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "attention with a mask": lambda m, x: F.scaled_dot_product_attention(x, x, x, torch.ones(3, 3, dtype=torch.bool).tril()),
    "statistics of a weight": lambda m, x: x + m.weight * torch.rsqrt(m.weight.pow(2).mean(-1, keepdim=True) + 1e-5),
    "a norm over several dimensions": lambda m, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-5),
    "another tensor's statistics": lambda m, x: x * torch.rsqrt(m.fc1(x).pow(2).mean(-1, keepdim=True) + 1e-5),
    "unit length": lambda m, x: F.normalize(x, dim=-1),
}


@pytest.mark.parametrize("function", NOTHING.values(), ids=NOTHING)
def test_what_is_none_of_the_kinds_is_not_counted(function: Callable[[Written, Tensor], Tensor]) -> None:
    assert counted(function) == {}


def _halves(m: Written, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, -1)
    return F.silu(gate) * up


def _interleaved(m: Written, x: Tensor) -> Tensor:
    both = m.both(x)
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def _expert(m: Written, x: Tensor) -> Tensor:
    gate, up = torch.bmm(x, m.experts[:2]).split(N, -1)
    return up * F.gelu(gate)


GATES: dict[str, Callable[[Written, Tensor], Tensor]] = {
    "two Linears": lambda m, x: F.silu(m.fc1(x)) * m.fc2(x),
    "the other way round": lambda m, x: m.fc2(x) * F.gelu(m.fc1(x), approximate="tanh"),
    "in place": lambda m, x: F.silu(m.fc1(x)).mul_(m.fc2(x)),
    "written out": lambda m, x: m.fc2(x) * _gelu_new(m.fc1(x)),
    "with dropout": lambda m, x: m.dropout(F.silu(m.fc1(x))) * m.fc2(x),
    "two views of the input": lambda m, x: F.relu(m.fc1(x.flatten(0, 1))) * m.fc2(x).flatten(0, 1),
    "halves": _halves,
    "glu": lambda m, x: F.glu(m.both(x)),
    "every other column": _interleaved,
    "halves of an expert": _expert,
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_a_gate_is_a_gated_linear_and_a_linear(gate: Callable[[Written, Tensor], Tensor], train: bool) -> None:
    assert counted(gate, train) == {"linear": (0, 1), "gated_linear": (0, 1)}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.silu(m.fc1(x)) * m.fc2(x[:, :1]),
        lambda m, x: torch.sigmoid(m.fc1(x)) * x,
        lambda m, x: F.silu(m.fc1(x)) + m.fc2(x),
        lambda m, x: F.silu(m.fc1(x)) * F.normalize(m.fc2(x)),
    ],
    ids=["of another input", "of no product", "a sum", "of a function of a product"],
)
def test_what_is_no_gate_is_a_linear_alone(function: Callable[[Written, Tensor], Tensor]) -> None:
    assert counted(function) == {"linear": (0, 1)}


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


NORMS: dict[str, tuple[str, Callable[[Written, Tensor], Tensor]]] = {
    "layer_norm": ("layer_norm", lambda m, x: F.layer_norm(x, (N,), m.weight, m.bias)),
    "by squares": (
        "layer_norm",
        lambda m, x: m.weight * (_centred(x) / torch.sqrt(_centred(x).pow(2).mean(-1, keepdim=True) + 1e-5)),
    ),
    "by var": ("layer_norm", lambda m, x: _centred(x) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * m.weight),
    "by std": ("layer_norm", lambda m, x: _centred(x) / (x.std(-1, keepdim=True) + 1e-5)),
    "over channels": (
        "layer_norm",
        lambda m, x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5) ** 0.5,
    ),
    "rms_norm": ("rms_norm", lambda m, x: F.rms_norm(x, (N,), m.weight, 1e-6)),
    "as transformers writes it": (
        "rms_norm",
        lambda m, x: m.weight * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
    ),
    "by a power": ("rms_norm", lambda m, x: x * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.5) * (1 + m.weight)),
    "over its root": ("rms_norm", lambda m, x: x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt()),
    "over its length": ("rms_norm", lambda m, x: m.weight * (x / (x.norm(dim=-1, keepdim=True) * N**-0.5 + 1e-6))),
    "of a group": ("rms_norm", lambda m, x: F.rms_norm(x.view(2, 3, 2, N // 2), (N // 2,)).flatten(-2)),
}


@pytest.mark.parametrize(("kind", "norm"), NORMS.values(), ids=NORMS)
def test_a_norm_is_found_as_one_operator_or_written_out(kind: str, norm: Callable[[Written, Tensor], Tensor]) -> None:
    assert counted(norm) == {kind: (0, 1)}
    assert counted(lambda m, x: norm(m, x + m.fc1(x))) == {kind: (0, 1), "add_norm": (0, 1)}
    assert counted(lambda m, x: norm(m, x + m.bias)) == {kind: (0, 1)}


def test_softmax_is_counted_as_a_function_a_method_and_a_module() -> None:
    def attention(m: Written, x: Tensor) -> Tensor:
        weights = F.softmax(x @ x.transpose(1, 2), dim=-1).softmax(0)
        return nn.Softmax(dim=1)(weights @ x)

    assert counted(attention) == {"softmax": (0, 3)}
    assert counted(lambda m, x: fused_softmax(x + m.fc1(x)) + F.softmax(x + m.fc1(x), -1)) == {"softmax": (1, 2)}


def fused_forms(m: Written, x: Tensor) -> Tensor:
    """Each fused function once, in an order that makes none of them another's part."""
    y = fused_linear(x, m.fc1.weight, m.fc1.bias, "gelu")
    y = fused_gated_linear(y, m.fc1.weight, m.fc2.weight, activation="silu")
    y = fused_mlp(y, m.fc1.weight, None, m.fc2.weight, None, "relu")
    return fused_softmax(fused_rmsnorm(fused_layernorm(y + x, N, m.weight, m.bias), N))


def test_fused_functions_are_counted_as_what_they_stand_for() -> None:
    assert counted(fused_forms) == {
        "layer_norm": (1, 1),
        "rms_norm": (1, 1),
        "softmax": (1, 1),
        "linear": (3, 3),
        "gated_linear": (1, 1),
        "add_norm": (0, 1),
    }


@pytest.mark.parametrize("op", REGISTRY.values(), ids=REGISTRY)
def test_every_op_that_fuses_a_kind_is_counted_as_fused(op: Any) -> None:
    """Its basic sample, and the same call of its eager baseline: the kinds are the same, none fused."""
    sample = op.example("cpu", torch.float32)
    by_us, by_torch = (count(Called(f), sample.args, sample.kwargs) for f in (op.public, op.torch_fn))
    assert any(fused for fused, _ in by_us.values())
    assert not any(fused for fused, _ in by_torch.values())
    assert all(fused == total for fused, total in by_us.values())


class Called(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["inference", "autocast"]
)
def test_a_count_in_another_mode_is_the_same(mode: Callable[[], Any]) -> None:
    def every_kind(m: Written, x: Tensor) -> Tensor:
        y = _halves(m, F.layer_norm(x + m.bias, (N,)))
        y = F.scaled_dot_product_attention(y, y, y)
        return F.softmax(F.rms_norm(y + x, (N,)), -1) + fused_linear(x, m.fc1.weight, activation="relu")

    expected = counted(every_kind)
    assert expected == {
        "layer_norm": (0, 1),
        "rms_norm": (0, 1),
        "softmax": (0, 1),
        "linear": (1, 2),
        "gated_linear": (0, 1),
        "add_norm": (0, 1),
    }
    with mode():
        assert counted(every_kind) == expected


def test_a_scripted_module_is_counted() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.BatchNorm1d(N)))
    before = [b.clone() for b in model.buffers()]
    assert count(model, (torch.randn(2, N),), {})["linear"] == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_a_fused_product_without_an_activation_is_a_product() -> None:
    assert counted(lambda m, x: F.relu(fused_linear(x, m.fc1.weight))) == {"linear": (0, 1)}
    assert counted(lambda m, x: fused_linear(x, m.fc1.weight)) == {}


def test_a_gate_whose_linear_alone_is_fused_is_left_to_fuse() -> None:
    gate = counted(lambda m, x: fused_linear(x, m.fc1.weight, activation="silu") * m.fc2(x))
    assert gate == {"linear": (1, 1), "gated_linear": (0, 1)}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"torch_encoder"}))
def test_fuse_changes_what_is_fused_and_not_how_much_there_is(name: str, train: bool) -> None:
    model, inputs = MODELS[name](1)
    args, kwargs = (tuple(inputs.values()), {}) if len(inputs) == 1 and "input" in inputs else ((), inputs)
    before = count(model.train(train), args, kwargs)
    assert not any(fused for fused, _ in before.values())
    assert before["linear"][1] > 0
    fuse(model)
    after = count(model, args, kwargs)
    assert {kind: total for kind, (_, total) in after.items()} == {kind: total for kind, (_, total) in before.items()}
    assert any(fused for fused, _ in after.values())


def test_an_encoder_layer_of_torch_counts_the_same_as_one_operator_and_in_parts() -> None:
    model, inputs = MODELS["torch_encoder"](2)
    parts, whole = (count(model.train(train), (), inputs) for train in (True, False))
    assert whole == parts
    assert (whole["layer_norm"], whole["linear"], whole["add_norm"]) == ((0, 5), (0, 2), (0, 4))


class Stateful(nn.Module):
    """Draws random numbers of every generator, and changes its buffers in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(N)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + random.random() + np.random.rand()
        return F.dropout(self.bn(x))


@pytest.mark.parametrize("fails", [False, True])
def test_generators_and_buffers_are_as_before(fails: bool) -> None:
    model = Stateful().train()
    buffers, before = dict(model.named_buffers()), {k: v.clone() for k, v in model.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    if fails:
        model.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            count(model, (torch.randn(4, N, generator=torch.Generator()),), {})
    else:
        count(model, (torch.randn(4, N, generator=torch.Generator()),), {})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])
    assert {k: id(v) for k, v in model.named_buffers()} == {k: id(v) for k, v in buffers.items()}
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert model.training
    assert torch.is_grad_enabled()
