"""Kernels that lack a synchronisation instruction: each is noticed by the machine, or redundant."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops.testing.ptx.deletions import synchronisations, without
from tests.ptx.main_kernels import cases, kernel_names

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
    left = synchronisations(without(BODY, *found))
    assert left == []
    with pytest.raises(ValueError, match="is not there"):
        without(changed, found[2])


def test_every_kernel_is_a_main_kernel() -> None:
    launched = set().union(*(case.kernels() for case in cases().values()))
    assert launched == kernel_names()
