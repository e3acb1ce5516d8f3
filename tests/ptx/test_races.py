"""How a launch is described to SentryWard, which `python -m tests.ptx.races` asks about races. Needs no SentryWard."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops import fused_layernorm
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import forced
from tests.ptx import races
from tests.ptx.main_kernels import Case
from tests.ptx.race_input import Run, as_input, beyond, by_one_thread, runs_of


def _backward() -> Callable[[], Any]:
    """What prepares a layer norm's backward of nine rows of 496 columns, for one SM: four programs, and then a sum of columns."""
    x, weight = torch.randn(9, 496, requires_grad=True), torch.randn(496, requires_grad=True)
    y, dy = fused_layernorm(x, (496,), weight), torch.randn(9, 496)
    return lambda: torch.autograd.grad(y, (x, weight), dy)


@pytest.fixture(scope="module")
def launches() -> dict[str, Run]:
    return {
        run.kernel: run
        for run in runs_of(Case("backward", 90, _backward, (lambda: forced("layer_norm_bwd", RowConfig(1, 512, 4)),)))
    }


def test_a_launch_is_described_as_it_was_made(launches: dict[str, Run]) -> None:
    """Four programs of four warps take nine rows of 496 columns."""
    run = launches["layer_norm_bwd_kernel"]
    described = as_input(run)
    assert described["launch"] == {
        "grid_dim": [4, 1, 1],
        "block_dim": [128, 1, 1],
        "cluster_dim": [1, 1, 1],
        "dynamic_shared_bytes": run.shared,
    }
    assert run.shared > 0
    head = run.ptx[: run.ptx.index(".reqntid")]
    integers = re.findall(r"\.param \.u(\d+) (\w+)", head)
    assert [(f"u{bits}", name) for bits, name in integers] == [(a["type"], a["parameter"]) for a in described["arguments"]]
    values = [a["value"] for a in described["arguments"]]
    assert {9, 496} <= set(values)
    assert all(type(value) is int and 0 <= value < 2**32 for value in values)
    pointers = re.findall(r"\.param \.u64 \.ptr\b.* (\w+)", head)
    assert pointers
    assert len(pointers) + len(values) + head.count(".param .f32") == len(run.parameters) == len(run.program.parameters)


def test_negative_arguments_are_given_as_their_bits() -> None:
    ptx = ".visible .entry k(\n\t.param .u32 k_param_0,\n\t.param .u64 k_param_1\n)\n.reqntid 32\n{\n\tret;\n}\n"
    described = as_input(Run("", "k", ptx, 1, 1, 0, [-1, -2]))
    assert [a["value"] for a in described["arguments"]] == [2**32 - 1, 2**64 - 2]


def test_one_thread_of_those_that_hold_a_copy_stores_it(launches: dict[str, Run]) -> None:
    """In a sum of columns, threads hold copies. runs_of has run the kernel with both: the same bytes in global memory."""
    run = launches["column_sum_kernel"]
    copied = {text: bits for text, bits in run.copies.items() if bits}
    assert copied
    lanes = np.arange(run.program.threads)
    for store, bits in copied.items():
        assert "st.shared" in store
        assert 0 < (lanes & bits == 0).sum() < lanes.size
        assert f"and.b32 %thread, %thread, {bits};" in run.verified
    assert run.verified.count("\n") == run.ptx.count("\n")


def test_a_guard_stays_in_force() -> None:
    ptx = "\t@!%p1 st.shared.b32 [ %r1 + 0 ], %r2;\n\tret;\n"
    changed = by_one_thread(ptx, {"@!%p1 st.shared.b32 [ %r1 + 0 ], %r2": 4})
    assert "not.pred %also, %p1; and.pred %one, %one, %also; @%one st.shared.b32 [ %r1 + 0 ], %r2;" in changed
    with pytest.raises(ValueError, match="not in the PTX"):
        by_one_thread(ptx, {"st.shared.b32 [ %r9 + 0 ], %r2": 4})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.global.b32 %r1, [%rd1]; st.global.b32 [%rd1], %r1;", ""),
        ("ld.param.b32 %r1, [k_param_0]; setp.eq.s32 %p1, %r1, 0; @%p1 bra $L;", ""),
        ("ld.shared.b32 %r1, [%r2]; add.s32 %r3, %r1, 1; st.shared.b32 [%r3], %r4;", "an address"),
        ("ld.global.b32 %r1, [%rd1]; setp.eq.s32 %p1, %r1, 0; @%p1 bra $L;", "a branch"),
        ("wgmma.fence.sync.aligned;", "wgmma"),
    ],
)
def test_what_sentryward_cannot_read_is_told_by_the_instructions(body: str, reason: str) -> None:
    ptx = (
        ".visible .entry k(.param .u32 k_param_0)\n.reqntid 32\n{\n"
        f".reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<4>;\n{body}\n$L:\nret;\n}}\n"
    )
    found = beyond(Run("", "k", ptx, 1, 1, 0, [0]).program)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("verdict", "expected", "bad"),
    [
        ("race_free", False, False),
        ("unsupported", True, False),
        ("unsupported", False, True),
        ("flagged", True, True),
        ("timeout", True, True),
    ],
)
def test_what_fails(verdict: str, expected: bool, bad: bool) -> None:
    assert races.Verdict("case", "kernel", verdict, 1.0, expected=expected).bad is bad


def test_without_sentryward_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sentryward", None)
    assert races.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "make races" in line


def test_a_verifier_that_flags_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Blind:
        @staticmethod
        def verify(*_: object, **__: object) -> dict[str, object]:
            return {"result": "race_free", "diagnostics": [], "elapsed_seconds": 0.0}

    monkeypatch.setitem(sys.modules, "sentryward", Blind)  # type: ignore[arg-type]
    assert races.main([]) == 1
    assert "say nothing" in capsys.readouterr().err
