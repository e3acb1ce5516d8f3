"""fuse runs nobody's code and changes nothing but the model: other threads, globals, the user's lists, random state."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import fuse, unfuse
from fused_ops._fuse import norm_formula
from tests.fuse.doors import (
    MADE,
    GatedMlp,
    Mlp,
    activations,
    assert_fuses_linears,
    assert_outcomes,
    assert_same,
    built,
    everything,
    fused_copy,
    is_linear,
    linears,
    on,
    outcome,
    quiet_fuse,
    state,
    x4,
)
from tests.fuse.norm_modules import Wide

pytestmark = pytest.mark.filterwarnings("ignore")
SEEN: list[Any] = []
COUNTS: dict[str, int] = {}
TOTAL = 0


class Keeping(Mlp):
    """A forward that leaves something everywhere it can."""

    made: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.named: dict[str, Any] = {}
        self.last: Any = None
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global TOTAL
        TOTAL += 1
        h = self.fc1(x)
        self.kept.append(h)
        SEEN.append(h)
        COUNTS["forward"] = COUNTS.get("forward", 0) + 1
        h = self.act(h)
        self.last = self.named["h"] = h
        self.made.append(h)
        self.calls += 1
        setattr(self.fc1, "note", h)  # noqa: B010
        return self.fc2(h)


def test_nothing_is_left_in_lists_dicts_globals_and_attributes():
    model = nn.Sequential(Keeping(), GatedMlp(), nn.Sequential(Keeping(), nn.ReLU()))
    before = [
        {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (list, dict)) and k != "_modules"}
        for m in model.modules()
    ]
    SEEN.clear()
    COUNTS.clear()
    Keeping.made.clear()
    total = TOTAL
    with fuse(model):
        for m in model.modules():
            if isinstance(m, Keeping):
                assert (m.kept, m.named, m.last, int(m.calls)) == ([], {}, None, 0)
            assert "note" not in vars(m)
    assert (SEEN, COUNTS, Keeping.made, TOTAL) == ([], {}, [], total)
    after = [{k: v for k, v in vars(m).items() if isinstance(v, (list, dict)) and k != "_modules"} for m in model.modules()]
    assert [list(a) for a in after] == [list(b) for b in before]
    reference = copy.deepcopy(model).double()
    fused = fused_copy(reference)
    assert_same(reference, fused, lambda m: m(x4()))
    for kept in ("kept", "last"):
        torch.testing.assert_close(getattr(fused[0], kept), getattr(reference[0], kept))
    torch.testing.assert_close(fused[0].fc1.note, reference[0].fc1.note)


def _calls(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts the calls of a class's forward, in a new list."""
    found: list[str] = []
    real = cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(cls.__name__)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    return found


class Raising(Mlp):
    """A forward that must not be run by anyone."""

    ran = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).ran += 1
        if x is not None:
            raise SystemExit("forward was run")
        return self.fc2(self.act(self.fc1(x)))


class UnknownNames(Mlp):
    """A forward whose names do not exist, whose imports fail, and that runs fine while nobody asks."""

    asked = False
    ran = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        UnknownNames.ran += 1
        if self.asked:
            import no_such_module

            return no_such_module.run(no_such_name(x))  # noqa: F821
        return self.fc2(self.act(self.fc1(x)))


class OwnLinear(nn.Linear):
    ran = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        OwnLinear.ran += 1
        return super().forward(input) + 1


class OwnActivation(nn.Module):
    ran = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        OwnActivation.ran += 1
        return F.gelu(x)


@pytest.mark.parametrize("cls", [Raising, UnknownNames])
def test_a_forward_is_never_run(cls: type[Mlp]):
    for counted in (cls, OwnLinear, OwnActivation):
        counted.ran = 0
    model = nn.Sequential(cls(act=OwnActivation()), cls(), OwnLinear(4, 4), nn.GELU(), OwnActivation())
    model[1].fc1 = OwnLinear(4, 4)
    report = fuse(model)
    unfuse(model)
    quiet_fuse(model, ops=["mlp"])
    assert (cls.ran, OwnLinear.ran, OwnActivation.ran) == (0, 0, 0)
    assert report.fused
    if cls is UnknownNames:
        assert torch.isfinite(model(torch.ones(2, 4))).all()
        model[0].asked = True
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            model(torch.ones(2, 4))


def test_no_module_is_called_while_fusing():
    """Not by a forward, a hook or a global hook."""
    model = everything()
    seen: list[str] = []
    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(lambda m, args: seen.append(type(m).__name__)),
        torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__)),
    ]
    try:
        quiet_fuse(model)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == []


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "t5_gated"])
def test_no_forward_of_transformers_is_called(name: str, monkeypatch: pytest.MonkeyPatch):
    model, arguments = built(name)
    names = {p.rpartition(".")[0] for p in (*activations(model), *linears(model))}
    classes = {type(model.get_submodule(p)) for p in names} | {nn.Linear}
    with monkeypatch.context() as patch:
        calls = [_calls(cls, patch) for cls in classes]
        quiet_fuse(model)
        assert calls == [[] for _ in classes]
        unfuse(model)
        model(**arguments)
        assert all(calls), "the counters count nothing"


def _guarded() -> list[Any]:
    module = nn.Module
    return [
        module.__call__,
        module._call_impl,
        module._wrapped_call_impl,
        module.__getattr__,
        module.__setattr__,
        nn.Linear.forward,
        nn.LayerNorm.forward,
        nn.Sequential.forward,
        nn.GELU.forward,
        torch.finfo,
        torch.nn.functional.gelu,
        torch.nn.functional.linear,
        torch.nn.functional.softmax,
        torch.Tensor.__torch_function__,
        torch.Tensor.relu,
        sys.gettrace(),
        sys.getprofile(),
        *(
            id(hooks)
            for hooks in (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_backward_hooks)
        ),
        len(torch.nn.modules.module._global_forward_hooks),
    ]


def test_torch_stays_as_it_is_during_and_after():
    model = nn.ModuleList([everything(), Keeping(), *(built(name)[0] for name in ("bert", "gpt2", "t5"))])
    before, during = _guarded(), []
    fuse(model, filter_fn=lambda name, module: during.append(_guarded()) or True)
    assert len(during) > 10
    assert all(d == before for d in during)
    assert _guarded() == before
    unfuse(model)
    assert _guarded() == before


class Stop(BaseException):
    """As control-C or a timeout: no Exception."""


class Interrupting(Mlp):
    """Interrupts whoever reads a property of it, once armed."""

    armed = False

    @property
    def scale(self) -> float:
        if self.armed:
            raise Stop("property")
        return 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x))) * self.scale


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, TimeoutError, RecursionError, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_what_filter_fn_raises_passes_through(error: type[BaseException], at: int):
    model = everything()
    reference = copy.deepcopy(model)
    before = state(model)
    asked: list[str] = []

    def stop(name: str, module: nn.Module) -> bool:
        asked.append(name)
        if len(asked) > at:
            raise error("mine")
        return True

    with pytest.raises(error, match="mine"):
        fuse(model, filter_fn=stop)
    assert len(asked) == at + 1
    assert state(model) == before
    assert_same(reference, model, lambda m: m(x4()))
    assert_fuses_linears(fuse(model))


def test_a_property_that_interrupts():
    """It is not read by fuse, or what it raises passes through and the model is as it was."""
    model = nn.Sequential(Mlp(), Interrupting(), GatedMlp()).double()
    reference, before = copy.deepcopy(model), state(model)
    Interrupting.armed = True
    try:
        quiet_fuse(model)
    except Stop:
        assert state(model) == before
    finally:
        Interrupting.armed = False
    assert_same(reference, model, lambda m: m(x4()))


def _lines(model: nn.Module, stop_at: int, error: type[BaseException] = Stop) -> int:
    """Fuses, and raises an error at one line of fuse, as control-C or an alarm may; how many lines were run."""
    lines = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        if "fused_ops/_fuse" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        lines += event == "line"
        if lines == stop_at:
            sys.settrace(None)
            raise error("line")
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        fuse(model)
    finally:
        sys.settrace(old)
    return lines


class AlarmError(Exception):
    """What a handler of signal.alarm may raise."""


@pytest.mark.parametrize("error", [Stop, TimeoutError, AlarmError])
def test_an_interrupt_at_any_line_leaves_a_right_model(error: type[BaseException]):
    def made() -> nn.Module:
        torch.manual_seed(0)
        norm = Wide(4)  # its forward is run on symbols, unless it is known from another test
        norm_formula._VERDICTS.pop(Wide, None)
        return nn.Sequential(Mlp(), GatedMlp(), nn.Linear(4, 4), nn.ReLU(), norm).double().eval()

    kept = made()  # its classes stay known, so that every fuse runs the same lines
    _lines(kept, -1)
    count = _lines(made(), -1)
    assert _lines(made(), -1) == count
    assert count > 50
    for line in {*(count * i // 16 for i in range(1, 16)), *range(count - 8, count)}:
        model = made()
        before, expected = state(model), outcome(model, lambda m: m(x4()))
        with pytest.raises(error, match="line"):
            _lines(model, line, error)
        assert_outcomes(outcome(model, lambda m: m(x4())), expected)
        unfuse(model)
        assert state(model) == before, f"interrupted at line {line} of {count}"


@pytest.mark.parametrize("name", MADE)
def test_random_state_and_modes_stay(name: str):
    model, arguments = built(name)
    reference = copy.deepcopy(model)
    torch.manual_seed(11)
    import random

    def now() -> list[Any]:
        return [
            torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled(), torch.get_default_dtype(),
            torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.mha.get_fastpath_enabled(),
            [(m.training, [(p.requires_grad, p.grad is None, p._version) for p in m.parameters(recurse=False)]) for m in model.modules()],
        ]  # fmt: skip

    before = now()
    with torch.no_grad(), fuse(model):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            assert now() == before
    assert now() == before
    quiet_fuse(model)
    assert now() == before
    assert any(is_linear(m) for m in model.modules())
    assert [k for k, _ in outcome(model, on(arguments))] == [k for k, _ in outcome(reference, on(arguments))]


@pytest.mark.parametrize(
    "make",
    [lambda: torch.device("meta"), torch.inference_mode, lambda: torch.autocast("cpu")],
    ids=["meta", "inference", "autocast"],
)
def test_fused_within_a_mode(make: Callable):
    model = everything()
    reference = copy.deepcopy(model)
    with make():
        fuse(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_same(reference, model, lambda m: m(x4()))
