"""The gate on compiled kernels, and the parsing that it rests on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_ops._tools import audit
from fused_ops.kernels import aot
from tests import process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")


EACH = 3  # of a kernel's configurations, the first and each third after it are compiled by `make test`


def _parts() -> tuple[list[dict], list[dict]]:
    """(what `make test` compiles, of bf16 and fp8 on sm_90; the others: bf16 on all architectures, and fp32 on that one)."""
    hopper = audit.audit_cases((90,), lambda case: case.dtype != "fp32")
    number = {kernel: itertools.count() for kernel in {case["kernel"] for case in hopper}}
    first = [next(number[case["kernel"]]) % EACH == 0 for case in hopper]
    others = list(itertools.compress(hopper, [not taken for taken in first]))
    others += audit.audit_cases([arch for arch in audit.ARCHITECTURES if arch != 90], lambda case: case.dtype == "bf16")
    others += audit.audit_cases((90,), lambda case: case.dtype == "fp32")
    return list(itertools.compress(hopper, first)), others


FIRST, OTHERS = _parts()
CASES = FIRST + OTHERS
# (kernel, arch, Triton): what is known and left. Every other configuration of this kernel that does not spill there loads
# 16 bits at a time under Triton 3.6, which is worse.
KNOWN = {("softmax_bwd_kernel", 100, "3.7.1"): ["N=197 bf16: spills 8 bytes a thread"]}
PARTS = [pytest.param(True, id="first"), pytest.param(False, id="others", marks=pytest.mark.slow)]


@functools.cache
def compiled(first: bool) -> list[audit.AuditRow]:
    """Compiled by this Triton, or by that of FUSED_OPS_TEST_PYTHON, an interpreter of another environment."""
    return audit.run_audit(FIRST if first else OTHERS, jobs=2, python=os.environ.get("FUSED_OPS_TEST_PYTHON"))


def _groups() -> list:
    """Every (kernel, arch) of either part."""
    return [
        pytest.param(*group, *part.values, id=f"{group[0]}-sm{group[1]}-{part.id}", marks=part.marks)
        for part, cases in zip(PARTS, (FIRST, OTHERS))
        for group in sorted({(case["kernel"], case["arch"]) for case in cases})
    ]


@pytest.mark.xdist_group("audit")  # one process compiles
@pytest.mark.parametrize(("kernel", "arch", "first"), _groups())
def test_compiled_kernels_pass_the_gate(kernel: str, arch: int, first: bool) -> None:
    group = [row for row in compiled(first) if (row.kernel, row.arch) == (kernel, arch)]
    assert group
    if all(row.skipped for row in group):
        pytest.skip(group[0].skipped)
    group = [row for row in group if not row.skipped]
    findings = [f"{row.config} {row.dtype}: {finding}" for row in group for finding in row.findings()]
    assert findings == KNOWN.get((kernel, arch, group[0].triton), []), "\n".join(findings)
    for row in group:
        assert row.registers > 0
        assert row.load_bits > 0 or "_tma_" in kernel  # those read through descriptors
        assert row.occupancy > 0


@pytest.mark.parametrize("cases", [FIRST, OTHERS], ids=["first", "others"])
def test_every_kernel_of_every_op_is_audited(cases: list[dict]) -> None:
    kernels = {case["kernel"] for case in cases}
    launched = set()
    for path in Path(aot.__file__).parent.rglob("*.py"):
        lines = path.read_text().splitlines()
        launched |= {line[4:].split("(")[0] for line in lines if line.startswith("def ") and "_kernel(" in line}
    launched.discard("_kernel")
    assert launched == kernels


def test_compiling_needs_no_torch() -> None:
    case = next(c for c in CASES if c["kernel"] == "column_sum_kernel")
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['aot', '--jobs', '1']\n"
        f"import runpy; runpy.run_path({aot.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps([case]), capture_output=True, text=True)
    row = json.loads(done.stdout)
    assert "error" not in row, row
    assert row["registers"] > 0


def test_a_kernel_that_does_not_compile_is_a_finding() -> None:
    case = dict(next(c for c in CASES if c["kernel"] == "column_sum_kernel"))
    case["constexprs"] = {"BLOCK_P": 3, "BLOCK_N": 64}
    (row,) = audit.run_audit([case], jobs=1)
    assert row.findings()[0].startswith("does not compile")


def test_a_case_of_a_later_triton_is_skipped_and_is_no_finding() -> None:
    case = next(c for c in CASES if c["kernel"] == "column_sum_kernel")
    later, now, broken = (dict(case, min_triton=v) for v in ([99, 0], [3, 6], [99, 0]))
    broken["constexprs"] = {"BLOCK_P": 3, "BLOCK_N": 64}
    first, second, third = audit.run_audit([later, now, broken], jobs=1)
    assert first.skipped == third.skipped == "needs Triton 99.0 or later"
    assert first.findings() == third.findings() == second.findings() == []
    assert (first.registers, second.skipped) == (0, "")
    assert second.registers > 0


def test_clusters_are_audited_where_they_are() -> None:
    clusters = [case for case in CASES if case["num_ctas"] > 1]
    assert {case["arch"] for case in clusters} == {90, 100}
    assert {case["arch"] for case in clusters if case in FIRST} == {90}
    assert {case["kernel"] for case in clusters} >= {"softmax_fwd_cluster_kernel", "softmax_bwd_packed_kernel"}
    assert all(case["min_triton"] == [3, 8] and "clusters of 8" in case["config"] for case in clusters)
    assert all(case["min_triton"] is None for case in CASES if case["num_ctas"] == 1)


@pytest.mark.xdist_group("audit")
@pytest.mark.parametrize("first", PARTS)
def test_each_program_of_a_cluster_moves_its_part_only(first: bool) -> None:
    both = zip(compiled(first), FIRST if first else OTHERS)
    clusters = [(row, case) for row, case in both if case["num_ctas"] > 1 and not row.skipped]
    if not clusters:
        pytest.skip("clusters need Triton 3.8 or later")
    for row, case in clusters:
        read = {"x_ptr", "w_ptr", "b_ptr", "dy_ptr"} | ({"y_ptr"} if "dy_ptr" in case["signature"] else set())
        bits = 16 if row.dtype == "bf16" else 32
        part = case["constexprs"]["BLOCK_N"] * bits // (case["num_ctas"] * 32 * case["num_warps"])  # of a thread
        assert row.loads["128"] == part * len(read & set(case["signature"])), row
        assert row.stores["128"] == part, row
        assert row.cluster_accesses > 0, row


def test_findings() -> None:
    good = audit.AuditRow("k", "c", 90, "bf16", "3", 4, True, 32, 0, 0, 128, 128, "", 8, 232448)
    assert good.findings() == []
    for change, word in (
        ({"spill_bytes": 8}, "spills 8"),
        ({"shared_bytes": 232449}, "shared memory"),
        ({"load_bits": 64}, "loads 64 bits"),
        ({"error": "E: x"}, "does not compile"),
        ({"num_ctas": 8}, "shares nothing"),
    ):
        (finding,) = dataclasses.replace(good, **change).findings()
        assert word in finding
    assert dataclasses.replace(good, load_bits=16, aligned=False).findings() == []
    assert dataclasses.replace(good, num_ctas=8, cluster_accesses=1).findings() == []
    assert tuple(good.as_json()) == audit.JSON_KEYS


def test_widths_of_ptx() -> None:
    ptx = """
    @%p1 ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ], %rd9;
    ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    ld.global.nc.v2.b64 {%rd5, %rd6}, [%rd2];
    ld.shared.b32 %r9, [%r8];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    st.global.v8.b32 [ %rd1 + 0 ], { %r1 };
    """
    assert aot.widths(ptx, "ld") == {128: 384, 16: 16}
    assert aot.widths(ptx, "st") == {256: 256}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        (90, 64, 0, 32, 1),
        (90, 32, 0, 4, 16),
        (90, 128, 0, 4, 4),
        (90, 24, 100000, 4, 2),
        (90, 20, 0, 1, 32),
        (120, 32, 0, 32, 1),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, warps: int, programs: int) -> None:
    assert aot.occupancy(arch, registers, shared, warps) == programs


@pytest.mark.parametrize("text", ["91", "", "90,", "sm_90", "90 100"])
def test_unknown_architectures_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: some of 80, 86"):
        audit.parse_architectures(text)


def test_command_leaves_out_what_it_skips() -> None:
    done = process.run(process.command("audit", "--arch", "90", "--kernel", "softmax_fwd_cluster", "--json"))
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout) == []) == ("skipped (needs Triton 3.8 or later)" in done.stderr)


def test_command_prints_the_published_keys() -> None:
    done = process.run(process.command("audit", "--arch", "90", "--kernel", "column_sum", "--json"))
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table
    assert all(tuple(row) == audit.JSON_KEYS for row in table)
