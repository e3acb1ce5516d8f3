"""Hooks set after fuse, on modules and for all modules: they see what they see in the unfused model, and change what they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.fuse.doors import (
    MADE,
    Mlp,
    activations,
    assert_same,
    everything,
    fused_copy,
    linears,
    on,
    outcome,
    pair,
    tensors,
    x4,
)

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("forward_pre", "forward", "full_backward_pre", "full_backward")
GLOBAL = torch.nn.modules.module
Seen = list[tuple[str, str, list[torch.Tensor]]]


def _note(seen: Seen, name: str, kind: str) -> Callable:
    def hook(module: nn.Module, *values: Any) -> None:
        seen.append((name, kind, [t.detach().clone() for value in values for t in tensors(value)]))

    return hook


def assert_seen(got: Seen, expected: Seen) -> None:
    """The forward hooks in order; the backward hooks by name, since autograd orders them by when a node was made."""
    assert expected
    for seen in (got, expected):
        seen.sort(key=lambda s: ("backward" in s[1], s[0] if "backward" in s[1] else "", s[1] if "backward" in s[1] else ""))
    assert [s[:2] for s in got] == [s[:2] for s in expected]
    for (name, kind, a), (_, _, b) in zip(got, expected):
        assert len(a) == len(b), (name, kind)
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=lambda text, at=(name, kind): f"{at}: {text}")


def _parents(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(p.rpartition(".")[0] for p in (*activations(model), *linears(model))))


PLACES: dict[str, Callable[[nn.Module], list[str]]] = {
    "all": lambda m: [name for name, _ in m.named_modules()],
    "linears": linears,
    "activations": activations,
    "parents": _parents,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MADE)
def test_hooks_see_the_same(name: str, place: str):
    model, fused, arguments = pair(name)
    names = PLACES[place](model) or [""]
    records: list[Seen] = []
    for m in (model, fused):
        records.append([])
        m.train()
        for part in names:
            for kind in KINDS:
                getattr(m.get_submodule(part), f"register_{kind}_hook")(_note(records[-1], part, kind))
        outcome(m, on(arguments))
    assert_seen(records[1], records[0])
    assert {s[1] for s in records[0]} == set(KINDS)
    assert_same(model, fused, on(arguments), modes=(False,))


@pytest.fixture
def seen_by_all() -> Iterator[Seen]:
    """What hooks of all modules see, under the name that the test gives a module as an attribute."""
    seen: Seen = []
    handles = [
        getattr(GLOBAL, f"register_module_{kind}_hook")(
            lambda module, *values, kind=kind: (
                _note(seen, NAMES[id(module)], kind)(module, *values) if id(module) in NAMES else None
            )
        )
        for kind in KINDS
    ]
    yield seen
    for handle in handles:
        handle.remove()
    NAMES.clear()


NAMES: dict[int, str] = {}


@pytest.mark.parametrize("name", MADE)
def test_hooks_of_all_modules_see_the_same_modules_and_tensors(name: str, seen_by_all: Seen):
    model, fused, arguments = pair(name)
    records = []
    for m in (model, fused):
        NAMES.clear()
        NAMES.update({id(part): n for n, part in m.named_modules()})
        seen_by_all.clear()
        m.train()
        outcome(m, on(arguments))
        records.append(list(seen_by_all))
    assert_seen(records[1], records[0])
    called = {s[0] for s in records[0]}
    assert len(called & {*linears(model)}) >= 2


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_one_kind_of_hook_of_all_modules(kind: str):
    model = everything()
    fused = fused_copy(model)
    counts = []
    for m in (model, fused):
        seen: list[str] = []
        handle = getattr(GLOBAL, f"register_module_{kind}_hook")(
            lambda module, *values, seen=seen: seen.append(type(module).__name__)
        )
        try:
            outcome(m, lambda m: m(x4()))
        finally:
            handle.remove()
        counts.append(sorted(n for n in seen if "Norm" not in n and "Softmax" not in n))
    assert counts[0] == counts[1]
    assert_same(model, fused, lambda m: m(x4()))


CHANGES: dict[str, tuple[str, Callable]] = {
    "output": ("forward", lambda m, args, out: out * 2),
    "input": ("forward_pre", lambda m, args: (args[0] + 1,)),
    "gradient of the input": ("full_backward", lambda m, into, out: tuple(None if g is None else g * 3 for g in into)),
    "gradient of the output": ("full_backward_pre", lambda m, out: tuple(None if g is None else g * 3 for g in out)),
}


@pytest.mark.parametrize(
    "part",
    ["mlp.fc1", "mlp.act", "mlp.drop", "mlp.fc2", "function.fc2", "gated.up", "gated.act", "seq", "seq.0", "seq.1"],
)
@pytest.mark.parametrize("change", CHANGES)
def test_hooks_change_the_same(part: str, change: str):
    model = everything()
    fused = fused_copy(model)
    kind, hook = CHANGES[change]
    before = outcome(model, lambda m: m(x4()))
    handles = [getattr(m.get_submodule(part), f"register_{kind}_hook")(hook) for m in (model, fused)]
    after = outcome(model, lambda m: m(x4()))
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(before, after)), "the hook changes nothing"
    assert_same(model, fused, lambda m: m(x4()))
    for handle in handles:
        handle.remove()
    assert_same(model, fused, lambda m: m(x4()))


def test_hooks_with_keywords_always_called_and_of_the_state_dict():
    model = Mlp().double()
    fused = fused_copy(model)
    records: list[list[str]] = []
    for m in (model, fused):
        seen: list[str] = []
        m.act.register_forward_hook(lambda mod, args, kwargs, out, seen=seen: seen.append("kwargs"), with_kwargs=True)
        m.fc1.register_forward_hook(lambda mod, args, out, seen=seen: seen.append("always"), always_call=True)
        m.fc1.register_forward_pre_hook(lambda mod, args, seen=seen: seen.append("first"), prepend=True)
        m.fc2._register_state_dict_hook(lambda *args, seen=seen: seen.append("state_dict"))
        m(x4())
        m.state_dict()
        with pytest.raises(RuntimeError):
            m(torch.ones(2, 3).double())
        m.fc1._forward_pre_hooks.clear()
        m(x4())
        records.append(seen)
    assert records[0] == records[1]
    assert records[0].count("kwargs") == 2


def test_tensor_hooks_and_saved_tensors_hooks():
    model = everything()
    fused = fused_copy(model)
    for m in (model, fused):
        m.mlp.fc1.weight.register_hook(lambda g: g * 2)
        m.gated.gate.weight.register_hook(lambda g: g + 1)

    def offloaded(m: nn.Module) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.numpy() if not t.requires_grad else t.detach().numpy(), torch.from_numpy
        ):
            return m(x4())

    assert_same(model, fused, lambda m: m(x4()))
    assert_same(model, fused, offloaded)
