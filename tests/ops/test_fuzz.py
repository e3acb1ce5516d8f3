"""Calls drawn at random (tests/fuzz): a fixed few here, the whole behind `slow`; and proof that the checks notice faults."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import INTERPRET, Op
from tests.fuzz import check as checks
from tests.fuzz.calls import Call, parameters
from tests.fuzz.check import Failure, check
from tests.fuzz.draw import draw
from tests.fuzz.faults import FAULTS
from tests.fuzz.forms import LAYOUTS, VALUES, Form
from tests.fuzz.run import cases, outcome, told
from tests.fuzz.shrink import shrink
from tests.fuzz.ways import WAYS

pytestmark = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")
SEED, FEW, MANY = 16, 150, 2000


@pytest.mark.parametrize("first", range(0, FEW, 50))
def test_a_few_calls(first: int) -> None:
    """All but the compiled ones, which take seconds each."""
    numbers = [case for case in range(first, first + 50) if draw(SEED, case).way != "compile"]
    assert len(numbers) > 40
    assert not told([outcome(SEED, case) for case in numbers])


@pytest.mark.slow
def test_many_calls() -> None:
    seen = list(cases(SEED, range(MANY)))
    assert len(seen) == MANY
    assert not told(seen)


def test_what_is_drawn_is_broad() -> None:
    """Every op, way, layout, kind of values and kind of wrong argument is drawn, and the same again from the same seed."""
    calls = [draw(0, case) for case in range(800)]
    assert calls[:50] == [draw(0, case) for case in range(50)]
    forms = [form for call in calls for form in call.tensors.values() if form is not None]
    assert {call.op for call in calls} == set(REGISTRY)
    assert {call.way for call in calls} == set(WAYS)
    assert {form.layout for form in forms} == set(LAYOUTS)
    assert {form.values for form in forms} == set(VALUES)
    assert {len(call.lead) + len(call.inner) for call in calls} >= set(range(6))
    wrong = {(p.kind, call.fault[1]) for call in calls if call.fault for p in parameters(call.op) if p.name == call.fault[0]}
    assert {kind for kind, _ in wrong} == set(FAULTS)
    assert len(wrong) > 0.6 * sum(map(len, FAULTS.values()))


class _Faulty:
    """An op whose public function's results, and refusals, are changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
        op = REGISTRY[name]

        def public(*args: Any, **kwargs: Any) -> Any:
            return change(lambda: op.public(*args, **kwargs), args)

        public.__name__ = op.public.__name__
        self.op: Op = dataclasses.replace(op, public=public)
        monkeypatch.setattr(Call, "spec", property(lambda call: self.op if call.op == name else REGISTRY[call.op]))


def one_percent(out: Tensor) -> Tensor:
    return out * 1.01


def one_element(out: Tensor) -> Tensor:
    index = torch.zeros(out.numel(), dtype=torch.bool)
    index[-1] = True
    return torch.where(index.view(out.shape), out * (1 + 1e-3), out)


RESULTS = {
    "wrong by one percent": (one_percent, checks.CONTRACT_BROKEN),
    "one element wrong": (one_element, checks.CONTRACT_BROKEN),
    "NaN dropped": (torch.nan_to_num, checks.CONTRACT_BROKEN),
    "dtype wrong": (Tensor.double, "another dtype or shape than torch's"),
    "shape wrong": (lambda out: out.unsqueeze(0), "another dtype or shape than torch's"),
    "not contiguous": (lambda out: out.t().contiguous().t(), "a result is not contiguous"),
}


def _basic(name: str, **parts: Any) -> Call:
    """A small ordinary call of the op."""
    tensors = {p.name: Form(p.dtype or torch.float32, seed=i) for i, p in enumerate(parameters(name)) if p.kind == "tensor"}
    simple = {"dim": -1, "shape": "list", "eps": 1e-5, "name": None, "dtype": torch.bfloat16, "flag": False}
    options = {
        p.name: None if p.kind == "dtype" and p.optional else simple[p.kind] for p in parameters(name) if p.kind in simple
    }
    return dataclasses.replace(Call(name, (5,), (8,), 7, 6, tensors, options), **parts)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_ordinary_call_is_valid(name: str) -> None:
    assert check(_basic(name)) == "valid"
    assert {_run_way(name, way) for way in ("grad", "penalty", "vmap")} == {"valid"} or not REGISTRY[name].trains


def _run_way(name: str, way: str) -> str:
    needs = tuple(p.name for p in parameters(name) if p.kind == "tensor")
    return check(_basic(name, way=way, needs=needs)) if REGISTRY[name].trains else ""


@pytest.mark.parametrize("fault", RESULTS)
def test_a_wrong_result_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, noticed = RESULTS[fault]
    _Faulty(monkeypatch, "layer_norm", lambda call, args: change(call()))
    call = _basic("layer_norm")
    if fault == "NaN dropped":
        call = dataclasses.replace(call, tensors=call.tensors | {"input": Form(torch.float32, values="special")})
    with pytest.raises(Failure) as failure:
        check(call)
    assert failure.value.check == noticed


@pytest.mark.parametrize(
    ("way", "factor", "noticed"),
    [("grad", 1.01, checks.FAR), ("penalty", 1.01, checks.FAR), ("vmap", 1.01, checks.FAR), ("func_grad", 1.01, checks.FAR),
     ("jvp", 1.01, checks.FAR), ("grad", float("nan"), checks.MISPLACED)],
)  # fmt: skip
def test_a_wrong_derivative_is_noticed(way: str, factor: float, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * factor

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return tangent * factor

    def change(call: Any, args: Any) -> Tensor:
        return call() * 1.01 if way == "vmap" else Scaled.apply(call())

    _Faulty(monkeypatch, "softmax", change)
    with pytest.raises(Failure) as failure:
        check(_basic("softmax", way=way, needs=("input",)))
    assert failure.value.check == noticed


def _changes(call: Any, args: Any) -> Tensor:
    out = call()
    args[0].mul_(1.0).add_(1.0)
    return out


def _later(call: Any, args: Any) -> Tensor:
    _later.calls = getattr(_later, "calls", 0) + 1  # type: ignore[attr-defined]
    return call() * (1 + 1e-7 * _later.calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "noticed"),
    [(_changes, "changes an input"), (_later, "other bits the second time"),
     (lambda call, args: args[0], "a result shares an input's memory")],
)  # fmt: skip
def test_a_side_effect_is_noticed(change: Any, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _Faulty(monkeypatch, "softmax", change)
    with pytest.raises(Failure) as failure:
        check(_basic("softmax"))
    assert failure.value.check == noticed


def _raising(error: Exception) -> Any:
    def change(call: Any, args: Any) -> Any:
        raise error

    return change


def _take(call: Any, args: Any) -> Any:
    return torch.zeros(5, 8)


REFUSED = {
    "raw words": (_raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), "refusal: it does not begin with the op's name"),
    "no argument": (_raising(RuntimeError("fused_softmax: no")), "refusal: it names no argument"),
    "type": (_raising(AssertionError("fused_softmax: dim: got 7")), "refusal: an exception of type AssertionError"),
    "long": (_raising(IndexError("fused_softmax: dim: got " + "7" * 400)), "refusal: a message of more than 400 characters"),
    "two sentences": (_raising(IndexError("fused_softmax: dim: got 7. It is 1.")), "refusal: more than one sentence"),
    "taken": (_take, "takes what torch refuses"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_wrong_refusal_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, noticed = REFUSED[fault]
    call = _basic("softmax", fault=("dim", "out"))
    assert check(call) == "refused"
    _Faulty(monkeypatch, "softmax", change)
    with pytest.raises(Failure) as failure:
        check(call)
    assert failure.value.check == noticed


def test_a_refusal_of_what_is_right_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _Faulty(monkeypatch, "softmax", _raising(RuntimeError("fused_softmax: input: got float32, allowed: nothing")))
    with pytest.raises(Failure, match="refuses a valid call"):
        check(_basic("softmax"))
    with pytest.raises(Failure, match="refuses what torch takes"):
        check(_basic("softmax", fault=("dim", "numpy")))


def test_a_failing_call_is_made_simple() -> None:
    form = Form(torch.float16, "transposed", "normal", 10.0)
    call = dataclasses.replace(
        _basic("linear"), lead=(3, 4), inner=(129,), tensors={"input": form, "weight": form, "bias": form}
    )
    simple = shrink(call, lambda other: other.tensors["input"] is not None and other.inner[0] > 2)
    assert (simple.lead, simple.inner, simple.n) == ((), (3,), 1)
    assert simple.tensors == {"input": Form(torch.float32), "weight": Form(torch.float32), "bias": None}


def test_a_call_that_ends_its_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr("tests.fuzz.run.check", lambda call: os._exit(9) if call.op == "softmax" else "valid")
    seen = list(cases(0, range(60)))
    assert [o.case for o in seen] == list(range(60))
    ended = {draw(0, o.case).op for o in seen if o.state == "failed"}
    assert ended == {"softmax"}
