"""The gate on compiled kernels, and the parsing that it rests on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fused_ops._tools import audit, occupancy
from fused_ops.export.cli import app
from fused_ops.kernels import aot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")


EACH = 6  # of a kernel's configurations, the first and each sixth after it are compiled by `make test`
KERNELS = sorted(
    name
    for path in Path(aot.__file__).parent.rglob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
)


def _runs_on(kernel: str, arch: int) -> bool:
    """TMA and clusters are for compute capabilities 9 and 10."""
    return arch in (90, 100) or not any(word in kernel for word in ("_tma_", "_cluster_"))


@functools.cache
def parts() -> tuple[list[dict], list[dict]]:
    """(what `make test` compiles, of bf16 and fp8 on sm_90; the others: bf16 on all architectures, and all dtypes on that one)."""
    hopper = audit.audit_cases((90,))
    number = {kernel: itertools.count() for kernel in KERNELS}
    first = [c["dtype"] in ("bf16", "fp8e4nv") and next(number[c["kernel"]]) % EACH == 0 for c in hopper]
    return list(itertools.compress(hopper, first)), list(itertools.compress(hopper, [not taken for taken in first]))


@functools.cache
def cases(first: bool) -> list[dict]:
    if first:
        return parts()[0]
    return parts()[1] + audit.audit_cases(
        [arch for arch in audit.ARCHITECTURES if arch != 90], lambda case: case["dtype"] in ("bf16", "fp8e4nv")
    )


# (kernel, arch, minor version of Triton): what is known and left, by configuration.
# layer_norm_fwd_kernel: a row of 32768 takes 32 warps, of which a thread has 64 registers at most.
# linear_fwd_tma_kernel: tanh holds more registers than erf's gelu, for which the tile was chosen.
# The inner softmaxes and the sum of products on sm_100 and sm_120: ptxas keeps to 64, 80 and 96 registers, and one to seven
# numbers a thread wait on the stack, stored at one place and read back at one or two.
TANH = "128x256x64 tanh bias save pre bf16"
KNOWN = {
    ("softmax_bwd_inner_kernel", 100, "3.7"): {"N=197 K=33 bf16": "spills 16 bytes a thread"},
    ("softmax_fwd_inner_kernel", 120, "3.7"): {"N=197 K=33 chunked bf16": "spills 32 bytes a thread"},
    ("softmax_bwd_inner_kernel", 120, "3.7"): {"N=197 K=33 bf16": "spills 16 bytes a thread"},
    ("product_sum_kernel", 100, "3.7"): {"64x64x64 bf16": "spills 8 bytes a thread"},
    ("linear_fwd_tma_kernel", 100, "3.6"): {TANH: "spills 152 bytes a thread"},
    ("linear_fwd_tma_kernel", 100, "3.7"): {TANH: "spills 56 bytes a thread"},
    ("layer_norm_fwd_kernel", 120, "3.6"): {"N=32768 inference weight bias bf16": "spills 8 bytes a thread"},
    ("layer_norm_fwd_kernel", 90, "3.8"): {"N=32768 weight bias stats fp32": "spills 16 bytes a thread"},
    ("layer_norm_bwd_shared_kernel", 90, "3.8"): {"N=16384 weight need dw need db bf16": "spills 8 bytes a thread"},
    ("product_sum_kernel", 80, "3.7"): {"64x128x32 bf16": "spills 8 bytes a thread"},
    ("linear_fwd_tma_kernel", 90, "3.6"): {TANH: "spills 56 bytes a thread"},
    ("linear_fwd_tma_kernel", 90, "3.7"): {TANH: "spills 64 bytes a thread"},
    ("linear_fwd_tma_kernel", 90, "3.8"): {TANH: "spills 56 bytes a thread"},
    ("linear_fwd_tma_kernel", 90, "3.9"): {TANH: "spills 16 bytes a thread"},
}
PARTS = [pytest.param(True, id="first"), pytest.param(False, id="others", marks=pytest.mark.slow)]


@functools.cache
def compiled(first: bool) -> list[audit.AuditRow]:
    """Compiled by this Triton, or by that of FUSED_OPS_TEST_PYTHON, an interpreter of another environment."""
    return audit.run_audit(cases(first), jobs=2, python=os.environ.get("FUSED_OPS_TEST_PYTHON"))


def _groups() -> list:
    """Every (kernel, arch) of either part."""
    return [
        pytest.param(kernel, arch, *part.values, id=f"{kernel}-sm{arch}-{part.id}", marks=part.marks)
        for part, architectures in zip(PARTS, ((90,), audit.ARCHITECTURES))
        for kernel in KERNELS
        for arch in architectures
        if _runs_on(kernel, arch)
    ]


@pytest.mark.xdist_group("audit")  # one process compiles
@pytest.mark.parametrize(("kernel", "arch", "first"), _groups())
def test_compiled_kernels_pass_the_gate(kernel: str, arch: int, first: bool) -> None:
    group = [row for row in compiled(first) if (row.kernel, row.arch) == (kernel, arch)]
    assert group
    if all(row.skipped for row in group):
        pytest.skip(group[0].skipped)
    group = [row for row in group if not row.skipped]
    findings = [(f"{row.config} {row.dtype}", finding) for row in group for finding in row.findings()]
    known = KNOWN.get((kernel, arch, occupancy.minor(group[0].triton)), {})
    assert findings == [(name, known[name]) for row in group if (name := f"{row.config} {row.dtype}") in known]
    for row in group:
        assert row.registers > 0
        assert row.load_bits > 0 or "_tma_" in kernel  # those read through descriptors
        assert row.occupancy > 0


@pytest.mark.xdist_group("audit")
@pytest.mark.parametrize("first", PARTS)
def test_every_kernel_in_the_sources_is_audited(first: bool) -> None:
    """On each architecture that can run it: a kernel that no launch asks for, or that no audited call reaches, is missing."""
    for arch in (90,) if first else audit.ARCHITECTURES:
        found = {case["kernel"] for case in cases(first) if case["arch"] == arch}
        assert found == {kernel for kernel in KERNELS if _runs_on(kernel, arch)}, arch


@pytest.mark.xdist_group("audit")
def test_compiling_needs_no_torch() -> None:
    case = next(c for c in cases(True) if c["kernel"] == "column_sum_kernel")
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['aot', '--jobs', '1']\n"
        f"import runpy; runpy.run_path({aot.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps([case]), capture_output=True, text=True)
    row = json.loads(done.stdout)
    assert "error" not in row, row
    assert row["registers"] > 0


@pytest.mark.xdist_group("audit")
def test_a_kernel_that_does_not_compile_is_a_finding() -> None:
    case = dict(next(c for c in cases(True) if c["kernel"] == "column_sum_kernel"))
    case["constexprs"] = {"BLOCK_P": 3, "BLOCK_N": 64}
    (row,) = audit.run_audit([case], jobs=1)
    assert row.findings()[0].startswith("does not compile")


@pytest.mark.xdist_group("audit")
def test_a_case_of_a_later_triton_is_skipped_and_is_no_finding() -> None:
    case = next(c for c in cases(True) if c["kernel"] == "column_sum_kernel")
    later, now, broken = (dict(case, min_triton=v) for v in ([99, 0], [3, 6], [99, 0]))
    broken["constexprs"] = {"BLOCK_P": 3, "BLOCK_N": 64}
    first, second, third = audit.run_audit([later, now, broken], jobs=1)
    assert first.skipped == third.skipped == "needs Triton 99.0 or later"
    assert first.findings() == third.findings() == second.findings() == []
    assert (first.registers, second.skipped) == (0, "")
    assert second.registers > 0


@pytest.mark.xdist_group("audit")
@pytest.mark.parametrize("first", PARTS)
def test_clusters_are_audited_where_they_are(first: bool) -> None:
    clusters = [case for case in cases(first) if case["num_ctas"] > 1]
    assert {case["arch"] for case in clusters} == ({90} if first else {90, 100})
    assert {case["kernel"] for case in clusters} >= {"softmax_fwd_cluster_kernel", "softmax_bwd_packed_kernel"}
    assert all(case["min_triton"] == [3, 8] and case["config"].endswith("clusters of 8") for case in clusters)
    assert all(case["min_triton"] is None for case in cases(first) if case["num_ctas"] == 1)


@pytest.mark.xdist_group("audit")
@pytest.mark.parametrize("first", PARTS)
def test_each_program_of_a_cluster_moves_its_part_only(first: bool) -> None:
    both = zip(compiled(first), cases(first))
    clusters = [(row, case) for row, case in both if case["num_ctas"] > 1 and case["aligned"] and not row.skipped]
    if not clusters:
        pytest.skip("clusters need Triton 3.8 or later")
    for row, case in clusters:
        read = {"x_ptr", "w_ptr", "b_ptr", "dy_ptr"} | ({"y_ptr"} if "dy_ptr" in case["signature"] else set())
        types = {name: text[1:].partition(":")[0] for name, text in case["signature"].items()}
        bits = {name: 32 if text == "fp32" else 16 for name, text in types.items()}
        part = case["constexprs"]["BLOCK_N"] // (case["num_ctas"] * 32 * case["num_warps"])  # elements of a thread
        assert row.loads["128"] == part * sum(bits[name] for name in read & set(types)), row
        assert row.stores["128"] == part * bits["dx_ptr" if "dy_ptr" in types else "y_ptr"], row
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
    assert tuple(good.as_json()) == (*audit.JSON_KEYS, *audit.COUNTED_KEYS)


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


def _command(kernel: str) -> Any:
    """What the command says, in the process that has listed the cases already."""
    done = CliRunner().invoke(app, ["audit", "--arch", "90", "--kernel", kernel, "--json"])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.xdist_group("audit")
def test_command_leaves_out_what_it_skips() -> None:
    done = _command("softmax_fwd_cluster")
    assert (json.loads(done.stdout) == []) == ("skipped (needs Triton 3.8 or later)" in done.stderr)


@pytest.mark.xdist_group("audit")
def test_command_prints_the_published_keys() -> None:
    table = json.loads(_command("column_sum").stdout)
    assert table
    assert all(tuple(row) == (*audit.JSON_KEYS, *audit.COUNTED_KEYS) for row in table)
