"""Kernels that lack a synchronisation instruction: each is noticed by the machine, or redundant."""

from __future__ import annotations

import hashlib
import json
import re
import sys

import pytest
import triton

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops.testing.ptx.deletions import synchronisations, without
from fused_ops.testing.ptx.text import Parser
from tests.ptx.deletions import IDLE, NOTICED, Launch, launches, main
from tests.ptx.main_kernels import cases, kernel_names

WHOLE = ("softmax_fwd_packed", "rms_norm_bwd_one_pass", "linear_fwd_pointer_sm80")  # cases of `make test`, with all deletions
SHARE = 0.55  # of the instructions of a launch, those whose deletion is noticed, alone or once the idle ones are gone
SAMPLED = "linear_fwd_tma"  # of it, deletions of each kind until one is noticed
ORDER_WORDS = {"bar", "barrier", "mbarrier", "fence", "fenceproxy", "membar", "wait", "commit", "arrive", "griddepcontrol", "acquire",
               "release"}  # fmt: skip

BODY = """
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid 128
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<9>;
	.loc	1 5 1
	mov.b32 %r1, 0; // bar.sync 0;
	@%p1 bar.sync 	0;
{
	.reg .pred complete;
	.loc	2 79 5
	waitLoop:
	.loc	2 80 5
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
	@!complete bra.uni waitLoop;
}
	@!%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64; fence.proxy.async.shared::cta;
	cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r1, %r2}], [%r3];
	fence.acq_rel.gpu;
	cp.async.bulk.wait_group.read 	0;
	ret;
}
"""


def test_what_is_found_and_deleted() -> None:
    found = synchronisations(BODY)
    assert [(one.kind, one.line, one.text) for one in found] == [
        ("bar.sync", 9, "@%p1 bar.sync 0;"),
        ("mbarrier.try_wait", 15, "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;"),
        ("mbarrier.arrive.expect_tx", 18, "@!%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;"),
        ("fence.proxy.async", 18, "fence.proxy.async.shared::cta;"),
        ("fence.acq_rel", 20, "fence.acq_rel.gpu;"),
        ("cp.async.bulk.wait_group", 21, "cp.async.bulk.wait_group.read 0;"),
    ]
    changed = without(BODY, found[2], found[1])
    assert changed.splitlines()[14:18] == [
        "\tmov.pred complete, -1;",
        "\t@!complete bra.uni waitLoop;",
        "}",
        "\t fence.proxy.async.shared::cta;",
    ]
    assert synchronisations(without(BODY, *found)) == []
    with pytest.raises(ValueError, match="is not there"):
        without(changed, found[2])


def test_every_kernel_is_a_main_kernel() -> None:
    launched = set().union(*(case.kernels() for case in cases().values()))
    assert launched == kernel_names()


def _orders(op: tuple[str, ...]) -> bool:
    """Whether a word of a mnemonic says that it orders something. A bulk copy names the mbarrier that it completes on."""
    words = {word for part in op if part != "mbarrier::complete_tx::bytes" for word in re.split("_|::", part)}
    return not ORDER_WORDS.isdisjoint(words)


def _complete(launch: Launch) -> None:
    """Whatever orders anything is deleted, by the machine's own reading of the text."""
    ordering = [i.text for i in Parser(launch.ptx).program.instructions if _orders(i.op)]
    assert ["".join(one.text.split()) for one in launch.instructions] == ["".join(text.split()) + ";" for text in ordering]


def _studied(launch: Launch) -> None:
    """Every deletion is noticed, or its instruction is redundant: those that are go together, and nothing is said of what is left."""
    _complete(launch)
    verdicts = launch.verdicts()
    kinds = {one.kind for one in verdicts}
    assert {one.kind for one in verdicts if one.state != IDLE} == kinds
    assert sum(one.state != IDLE for one in verdicts) >= SHARE * len(verdicts)
    idle = [one for one, verdict in zip(launch.instructions, verdicts) if verdict.state == IDLE]
    assert launch.alarm(idle) == ""


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    marks = () if name in WHOLE else (pytest.mark.slow,)
    return marks if cases()[name].compiles else (*marks, pytest.mark.skip(reason="Triton compiles clusters from 3.8 on"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in cases()])
def test_every_deletion_is_noticed_or_redundant(name: str) -> None:
    found = launches(cases()[name])
    assert {launch.name for launch in found} == cases()[name].kernels()
    for launch in found:
        _studied(launch)


def test_a_deletion_of_each_kind_is_noticed() -> None:
    (launch,) = launches(cases()[SAMPLED])
    _complete(launch)
    by_hash = sorted(launch.instructions, key=lambda one: hashlib.sha256(f"{one.line} {one.text}".encode()).digest())
    for kind in {one.kind for one in by_hash}:
        assert any(launch.alarm([one]) for one in by_hash if one.kind == kind), kind


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = {name for name in WHOLE if "packed" in name}
    main(["--kernel", name, "--json"])
    version, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert version == {"triton": triton.__version__}
    assert {row["case"] for row in rows} == {name}
    assert {row["state"] for row in rows} == {NOTICED}
    main(["--kernel", name])
    version, *_, total = capsys.readouterr().out.splitlines()
    assert version == f"Triton {triton.__version__}"
    assert total.split() == ["all", "all", *map(str, (len(rows), len(rows), 0, 0))]
