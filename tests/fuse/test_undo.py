"""Undoing a fuse: to the bit, block by block, and refused in words where something else has changed a module since."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fused_ops import fuse, unfuse
from fused_ops.nn import FusedLayerNorm
from tests.fuse.doors import (
    MADE,
    Mlp,
    activations,
    assert_fuses_linears,
    assert_outcomes,
    assert_same,
    built,
    call,
    everything,
    fused_copy,
    linears,
    on,
    outcome,
    quiet_fuse,
    state,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_bits(got: list, expected: list) -> None:
    assert_outcomes(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MADE)
def test_everything_is_as_before_to_the_bit(name: str):
    fused, arguments = built(name)
    before, expected = state(fused), outcome(fused, on(arguments))
    assert_fuses_linears(fuse(fused))
    outcome(fused, on(arguments))
    assert unfuse(fused) > 0
    assert state(fused) == before
    assert_bits(outcome(fused, on(arguments)), expected)
    assert unfuse(fused) == 0


def test_copies_are_undone_alone():
    reference = everything()
    fused = copy.deepcopy(reference)
    original = state(fused)
    fuse(fused)
    before = state(fused)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused.mlp)):
        assert unfuse(copied) > 0
        part = reference.mlp if isinstance(copied, Mlp) else reference
        assert [type(m) for m in copied.modules()] == [type(m) for m in part.modules()]
        assert [set(vars(m)) for m in copied.modules()] == [set(vars(m)) for m in part.modules()]
        assert_bits(outcome(copied, call), outcome(part, call))
    assert state(fused) == before
    unfuse(fused)
    assert state(fused) == original


OPS = [["layer_norm", "gated_linear"], ["linear"], ["mlp"], None]


@pytest.mark.parametrize("first", OPS, ids=str)
@pytest.mark.parametrize("second", OPS, ids=str)
def test_blocks_within_blocks(first: list[str] | None, second: list[str] | None):
    reference = everything()
    fused = copy.deepcopy(reference)
    before = state(fused)
    with quiet_fuse(fused, ops=first):
        between = state(fused)
        with quiet_fuse(fused, ops=second):
            assert_same(reference, fused, call)
        assert state(fused) == between
        assert_same(reference, fused, call)
    assert state(fused) == before
    assert_bits(outcome(fused, call), outcome(reference, call))


@pytest.mark.parametrize("first", OPS, ids=str)
@pytest.mark.parametrize("second", OPS, ids=str)
def test_blocks_left_out_of_order(first: list[str] | None, second: list[str] | None):
    """The outer block is undone first, or refused and then undone after the inner one: never a wrong number between."""
    reference = everything()
    fused = copy.deepcopy(reference)
    before = state(fused)
    outer, inner = quiet_fuse(fused, ops=first), quiet_fuse(fused, ops=second)
    outer.__enter__()
    inner.__enter__()
    both = state(fused)
    try:
        outer.__exit__(None, None, None)
    except RuntimeError:
        assert state(fused) == both
    assert_same(reference, fused, call)
    inner.__exit__(None, None, None)
    assert_same(reference, fused, call)
    unfuse(fused)
    assert state(fused) == before


def test_a_block_within_a_fuse_and_a_fuse_within_a_block():
    reference = everything()
    fused = copy.deepcopy(reference)
    before = state(fused)
    fuse(fused)
    outside = state(fused)
    with quiet_fuse(fused):
        assert_same(reference, fused, call)
    assert state(fused) == outside
    unfuse(fused)
    assert state(fused) == before
    with fuse(fused):
        for part in (fused.mlp, fused):
            quiet_fuse(part)
            assert_same(reference, fused, call)
    assert_same(reference, fused, call)
    unfuse(fused)
    assert state(fused) == before


def test_exceptions_pass_through_a_block():
    fused = everything()
    before = state(fused)
    with pytest.raises(KeyError, match="mine"), fuse(fused), quiet_fuse(fused.mlp, ops=["linear"]):
        raise KeyError("mine")
    assert state(fused) == before
    for _ in range(3):  # the same report again and again leaves nothing behind
        with fuse(fused):
            call(fused)
        assert state(fused) == before


@pytest.mark.parametrize("part", ["", "mlp", "mlp.fc1", "mlp.act", "seq", "seq.1", "seq.2", "gated"])
def test_unfuse_within_a_block(part: str):
    reference = everything()
    fused = copy.deepcopy(reference)
    before = state(fused)
    with fuse(fused):
        unfuse(fused.get_submodule(part))
        assert_same(reference, fused, call)
    assert state(fused) == before


def test_what_was_set_since_stays():
    reference = everything()
    fused = fused_copy(reference)
    for m in (reference, fused):
        m.mlp.act = nn.Tanh()
        m.mlp.fc1 = nn.Identity()
        m.function.act = F.relu
        m.gated.note = "mine"
        m.gated.register_buffer("kept", torch.ones(1))
        m.seq.append(nn.Tanh())
        del m.seq[2]
        m.mlp.drop.p = 0.0
    assert_same(reference, fused, call)
    unfuse(fused)
    assert [(name, cls, set(values)) for name, cls, values in state(fused)] == [
        (name, cls, set(values)) for name, cls, values in state(reference)
    ]
    assert (fused.gated.note, fused.function.act, type(fused.mlp.act)) == ("mine", F.relu, nn.Tanh)
    assert_bits(outcome(fused, call), outcome(reference, call))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


REGISTERED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
}


@pytest.mark.parametrize("register", REGISTERED.values(), ids=REGISTERED)
@pytest.mark.parametrize("part", ["mlp.fc1", "function.fc2", "gated.gate", "seq.0", "head"])
def test_a_parametrized_linear_does_not_stand_in_the_way(register: Callable, part: str):
    reference = everything()
    fused = fused_copy(reference)
    for m in (reference, fused):
        torch.manual_seed(3)
        register(m.get_submodule(part))
    assert_same(reference, fused, call)
    unfuse(fused)
    assert [type(m).__name__ for m in fused.modules()] == [type(m).__name__ for m in reference.modules()]
    assert_same(reference, fused, call)
    for m in (reference, fused):
        if parametrize.is_parametrized(m.get_submodule(part)):
            parametrize.remove_parametrizations(m.get_submodule(part), "weight")
    assert [type(m) for m in fused.modules()] == [type(m) for m in reference.modules()]


@pytest.mark.parametrize(("part", "tensor"), [("mlp.norm", "weight"), ("seq.2", "bias"), ("", "gain")])
def test_a_parametrized_module_that_fuse_changed_is_refused(part: str, tensor: str):
    reference = everything()
    fused = copy.deepcopy(reference)
    before = state(fused)
    fuse(fused)
    for m in (reference, fused):
        parametrize.register_parametrization(m.get_submodule(part), tensor, Doubled())
    module = fused.get_submodule(part)
    between = state(fused)
    with pytest.raises(RuntimeError, match=type(module).__name__) as error:
        unfuse(fused)
    assert (part or "Everything") in str(error.value)
    assert state(fused) == between, "a refused unfuse changes nothing"
    assert_same(reference, fused, call)
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    unfuse(fused)
    assert [(name, cls) for name, cls, _ in state(fused)] == [(name, cls) for name, cls, _ in before]
    assert isinstance(module.get_parameter(tensor), nn.Parameter)


def test_a_block_that_cannot_be_undone_says_so():
    reference = everything()
    fused = copy.deepcopy(reference)
    report = fuse(fused)
    report.__enter__()
    parametrize.register_parametrization(fused.mlp.norm, "weight", Doubled())
    between = state(fused)
    with pytest.raises(RuntimeError, match=r"mlp\.norm"):
        report.__exit__(None, None, None)
    assert state(fused) == between
    parametrize.register_parametrization(reference.mlp.norm, "weight", Doubled())
    for model in (reference, fused):  # the parameter is another's place now
        parametrize.remove_parametrizations(model.mlp.norm, "weight", leave_parametrized=False)
    assert_same(reference, fused, call)
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in reference.modules()]


class Mine(FusedLayerNorm):
    """A class that the user puts in the place of what fuse put."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


def test_a_class_put_since_is_refused():
    fused = everything()
    fuse(fused)
    put, fused.seq[2].__class__ = type(fused.seq[2]), Mine
    between, expected = state(fused), outcome(fused, call)
    with pytest.raises(RuntimeError, match=r"seq\.2[\s\S]*Mine|Mine[\s\S]*seq\.2"):
        unfuse(fused)
    assert state(fused) == between
    assert_bits(outcome(fused, call), expected)
    fused.seq[2].__class__ = put
    unfuse(fused)
    assert type(fused.seq[2]) is nn.LayerNorm


def _bound(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.fc1(x) * 2


def test_a_forward_bound_since_stays():
    reference = everything()
    fused = fused_copy(reference)
    for m in (reference, fused):
        m.mlp.forward = types.MethodType(_bound, m.mlp)
    unfuse(fused)
    assert fused.mlp.__dict__["forward"].__func__ is _bound
    assert [type(m) for m in fused.modules()] == [type(m) for m in reference.modules()]
    assert_bits(outcome(fused, call), outcome(reference, call))


def test_the_parts_of_a_model_are_undone_one_by_one():
    fused, arguments = built("bert")
    before, expected = state(fused), outcome(fused, on(arguments))
    fuse(fused)
    names = [*linears(fused), *activations(fused), *[name for name, _ in fused.named_modules()][::-1]]
    assert sum(unfuse(fused.get_submodule(name)) for name in names) > 0
    assert state(fused) == before
    assert_bits(outcome(fused, on(arguments)), expected)
