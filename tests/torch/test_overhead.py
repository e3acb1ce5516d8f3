"""What a warm call costs the host, counted in calls: how many Python functions and how many C functions one call of an op
makes on the CPU, without gradients, with them, and in its backward.

A count is the same on a busy machine as on an idle one, and one more layer of Python or one more way through torch's
dispatcher changes it. How long a call takes is measured in bench/test_2_host.py.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.tensor  # once loaded, these two are looked at by every call that takes no fast path: loaded before
import torch.utils.flop_counter  # anything is counted, so that the tests that ran before make no difference

import fused_ops
from fused_ops import REGISTRY
from fused_ops.ops.norm import layer_norm
from fused_ops.testing import INTERPRET, Op, Sample, fast_path
from tests.contract import leaves

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's own calls would be counted")

OURS = (str(Path(fused_ops.__file__).parent), str(Path(__file__).parent))


class Calls(NamedTuple):
    """How many calls there were of Python functions, and of functions in Python and C together."""

    python: int
    all: int


STAGES = ("forward", "forward with gradients", "backward")
# The most calls of each stage, an op and the name of its sample, "" for its example; torch 2.13 to 2.15 make exactly these, but
# for one call of Python's that is one of C's from 2.14 on. Where a change makes fewer, write the fewer here. The example of an op
# without a row is held to OTHERS.
LIMITS: dict[tuple[str, str], tuple[Calls, ...]] = {
    ("softmax", ""): (Calls(3, 10), Calls(5, 15), Calls(5, 8)),
    ("layer_norm", ""): (Calls(5, 13), Calls(9, 21), Calls(8, 35)),
    ("rms_norm", ""): (Calls(6, 16), Calls(14, 33), Calls(7, 24)),
    ("linear", "None"): (Calls(6, 15), Calls(12, 28), Calls(12, 29)),
    ("linear", ""): (Calls(6, 16), Calls(11, 27), Calls(17, 45)),
    ("gated_linear", ""): (Calls(9, 28), Calls(12, 33), Calls(14, 47)),
    ("mlp", ""): (Calls(8, 27), Calls(13, 36), Calls(19, 54)),
    ("linear_fp8", ""): (Calls(11, 32),),
    ("layer_norm_fp8", ""): (Calls(9, 32),),
}
OTHERS = (Calls(12, 35), Calls(16, 40), Calls(20, 60))
# The numbers were counted under Python 3.11. Which built-in functions report a call differs between versions of Python.
C_SLACK = 0 if sys.version_info[:2] == (3, 11) else 4


def _is_ours(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(OURS)


def calls_of(function: Callable[[], Any]) -> tuple[Calls, list[str]]:
    """The calls that function makes, itself included, and the names of what was called.

    Left out, because they differ between versions of torch and Python: the calls that torch's own Python code makes, but
    for those of our functions, and the frames of comprehensions and generators.
    """
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            name = frame.f_code.co_name
            if (_is_ours(frame) or _is_ours(frame.f_back)) and (name == "<lambda>" or not name.startswith("<")):
                seen.append(("python", name))
        elif event == "c_call" and _is_ours(frame):
            seen.append(("C", argument.__name__))

    before = sys.getprofile()
    gc.disable()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
        gc.enable()
    assert seen.pop() == ("C", "setprofile")
    return Calls(sum(kind == "python" for kind, _ in seen), len(seen)), [name for _, name in seen]


def stages_of(spec: Op, sample: Sample) -> list[Callable[[], Any]]:
    """What is counted: each stage of STAGES that the op has, warmed up."""
    without = functools.partial(spec.public, *sample.args, **sample.kwargs)
    without(), without()
    if not spec.trains:
        return [without]
    args, wanted = leaves(sample.args)
    forward = functools.partial(spec.public, *args, **sample.kwargs)
    dy = torch.ones_like(forward())
    for _ in range(2):
        torch.autograd.grad(forward(), wanted, dy)
    return [without, forward, functools.partial(torch.autograd.grad, forward(), wanted, dy)]


def sample_of(op: str, name: str) -> Sample:
    dtype = torch.float32 if REGISTRY[op].trains else torch.bfloat16
    if not name:
        return REGISTRY[op].example("cpu", dtype)
    return next(sample for sample in REGISTRY[op].samples("cpu", dtype) if sample.name == name)


ROWS = [*LIMITS, *((op, "") for op in REGISTRY if (op, "") not in LIMITS)]


def over(limits: tuple[Calls, ...], stages: list[Callable[[], Any]]) -> list[str]:
    """What makes more calls than it may, with the names of all that it called."""
    found = []
    for stage, limit, function in zip(STAGES, limits, stages):
        made, names = calls_of(function)
        if made.python > limit.python or made.all > limit.all + C_SLACK:
            found.append(f"{stage}: {made}, at most {limit}: {' '.join(names)}")
    return found


@pytest.mark.parametrize(("op", "sample"), ROWS)
def test_calls(op: str, sample: str) -> None:
    assert not over(LIMITS.get((op, sample), OTHERS), stages_of(REGISTRY[op], sample_of(op, sample)))


def test_one_more_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count itself: one function more, around what runs or around what chooses it, is over the limit."""
    limit = LIMITS["layer_norm", ""][:1]
    forward = stages_of(REGISTRY["layer_norm"], sample_of("layer_norm", ""))[:1]
    infer = layer_norm._INFER["aten"]
    assert not over(limit, forward)
    monkeypatch.setitem(layer_norm._INFER, "aten", lambda *args: infer(*args))
    assert len(over(limit, forward)) == 1
    monkeypatch.setitem(layer_norm._INFER, "aten", infer)
    monkeypatch.setattr(layer_norm, "fast_path", lambda *tensors: fast_path(*tensors))
    assert len(over(limit, forward)) == 1


@pytest.mark.parametrize("op", REGISTRY)
def test_a_way_through_the_dispatcher_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op takes the fast path: without it a call goes by the raw operator, and by torch's autograd wrapper."""
    stages = stages_of(REGISTRY[op], sample_of(op, ""))[:2]
    fast = [calls_of(stage)[0] for stage in stages]
    module = sys.modules[REGISTRY[op].public.__module__]
    monkeypatch.setattr(module, "fast_path", lambda *_: None)
    for limit, stage in zip(fast, stages):
        made, names = calls_of(stage)
        assert "__call__" in names
        assert made.python > limit.python
        assert made.all > limit.all


def test_every_row_names_an_op() -> None:
    assert {op for op, _ in LIMITS} <= set(REGISTRY)
