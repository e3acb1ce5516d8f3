"""The table of programs an SM holds: its file, its gate, and what it says of the supported Tritons."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_ops._tools import audit, occupancy
from fused_ops._tools.occupancy import Key

A, B, C = (Key("layer_norm_fwd_kernel", config, "bf16", 90) for config in ("N=8", "N=16, edges", "N=32"))
OTHER = Key("layer_norm_fwd_kernel", "N=8", "bf16", 80)
TABLE: occupancy.Table = {"3.6": {A: 2, B: 3}, "3.7": {A: 1, B: 3, C: 4, OTHER: 5}, "3.8": {A: 1, B: 2}, "3.9": {}}


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    assert occupancy.load(path) == {version: {} for version in occupancy.VERSIONS}
    occupancy.save(TABLE, path)
    assert occupancy.load(path) == TABLE
    assert "layer_norm_fwd_kernel,N=8,bf16,80,,5,," in path.read_text().splitlines()
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_what_is_compiled_again_replaces_its_kernels_and_architectures() -> None:
    new = occupancy.updated(TABLE, "3.7", [A, C], {A: 7})  # C was skipped or does not compile; B is no longer launched
    assert new == {**TABLE, "3.7": {A: 7, OTHER: 5}}
    with pytest.raises(ValueError, match=r"Triton 3\.5: the table has columns for 3\.6"):
        occupancy.updated(TABLE, "3.5", [A], {A: 7})


@pytest.mark.parametrize(
    ("key", "triton", "programs", "finding"),
    [
        (A, "3.6.0", 2, ""),
        (A, "3.6.0", 3, ""),
        (A, "3.6.0", 1, "an SM holds 1 program, 2 by the table"),
        (B, "3.7.1", 2, "an SM holds 2 programs, 3 by the table"),
        (C, "3.6.0", 4, "not in the table"),
        (OTHER, "3.6.0", 1, ""),  # nothing is known of that architecture
        (A, "3.9.0", 1, ""),
        (A, "4.0.0", 1, ""),
    ],
)
def test_fewer_programs_than_the_table_says_are_a_finding(key: Key, triton: str, programs: int, finding: str) -> None:
    found = occupancy.findings(key, triton, programs, TABLE)
    assert len(found) == bool(finding)
    assert not finding or finding in found[0]
    row = audit.AuditRow(*key[:2], 90 if key is not OTHER else 80, key.dtype, triton, 4, False, occupancy=programs)
    assert row.key == key
    assert row.findings(TABLE) == found


def test_falls_are_from_one_version_to_the_next() -> None:
    assert occupancy.falls(TABLE) == [(A, "3.6", 2, "3.7", 1), (B, "3.7", 3, "3.8", 2)]


@pytest.mark.xdist_group("audit")
@pytest.mark.parametrize("version", occupancy.VERSIONS)
@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in audit.ARCHITECTURES if arch != 90)]
)
def test_the_table_holds_what_launches_ask_for_and_nothing_else(arch: int, version: str) -> None:
    held = {key for key in occupancy.committed()[version] if key.arch == arch}
    number = [int(part) for part in version.split(".")]
    asked = {
        Key(case["kernel"], case["config"], case["dtype"], arch)
        for case in audit.audit_cases((arch,))
        if case["min_triton"] is None or case["min_triton"] <= number
    }
    assert asked
    if arch != 90 and not held:
        pytest.skip(f"no entries yet: fused-ops audit --arch {arch} --write-table, with a Triton {version}")
    assert held == asked, f"{len(held - asked)} that no launch asks for, {len(asked - held)} missing"


LARGE = 0.75  # of the programs: what remains after a large fall; one register more a thread costs a small one
# (kernel, configuration, dtype, version after) -> (architectures, why it is left). The compiler takes more registers, by steps of 8.
ROW = "more registers than 64, of 512 threads: the second program no longer fits"
CHUNK = "more registers than 40, of 512 threads: the third program no longer fits"
FEW = "72 registers became 96; 5 programs of 4 warps remain"
GRID = "; its grid has 4 an SM at most"
POINTERS = "more than 128 registers, of 256 threads, or the like; unaligned operands only, for which there is no TMA"
STAGES = "with 3.6 one stage (matmul_plan.Operands.stages), which takes a quarter of the shared memory"
KNOWN_FALLS = {
    ("layer_norm_fwd_kernel", "N=16384 weight bias stats", "bf16", "3.7"): ({90, 100, 120}, ROW),
    ("layer_norm_fwd_kernel", "N=16384 weight bias stats", "bf16", "3.9"): ({90}, ROW + "; 3.8 had 64"),
    ("layer_norm_fwd_kernel", "N=16384 inference weight bias", "bf16", "3.7"): ({90, 100, 120}, ROW),
    ("layer_norm_fwd_kernel", "N=16384 inference weight bias", "bf16", "3.9"): ({90}, ROW + "; 3.8 had 64"),
    ("layer_norm_fwd_kernel", "N=8192 weight bias stats", "fp32", "3.7"): ({120}, CHUNK),
    ("layer_norm_fwd_kernel", "N=8192 weight bias stats", "fp32", "3.9"): ({90}, CHUNK),
    ("layer_norm_fwd_cluster_kernel", "N=131072 weight bias stats clusters of 8", "fp32", "3.9"): ({90}, ROW),
    ("layer_norm_fwd_chunked_kernel", "N=50257 weight bias stats edges", "bf16", "3.7"): ({90}, CHUNK),
    ("layer_norm_fwd_chunked_kernel", "N=50257 weight bias stats edges", "bf16", "3.9"): ({90}, CHUNK + "; 3.8 had 40"),
    ("layer_norm_fwd_chunked_kernel", "N=65536 weight bias stats", "fp32", "3.7"): ({80}, CHUNK),
    ("layer_norm_fwd_chunked_kernel", "N=65536 weight bias stats", "fp32", "3.8"): ({90}, CHUNK),
    ("layer_norm_fwd_chunked_kernel", "N=65536 weight bias stats", "bf16", "3.9"): ({90}, CHUNK),
    ("layer_norm_fwd_chunked_kernel", "N=65536 inference weight bias", "bf16", "3.9"): ({90}, CHUNK),
    ("rms_norm_fwd_kernel", "N=16384 weight stats", "fp32", "3.7"): ({100, 120}, ROW),
    ("rms_norm_fwd_chunked_kernel", "N=32768 weight stats", "fp32", "3.7"): ({120}, CHUNK),
    ("rms_norm_fwd_chunked_kernel", "N=50257 stats edges", "bf16", "3.7"): ({100, 120}, CHUNK),
    ("rms_norm_fwd_chunked_kernel", "N=50257 weight stats edges", "fp32", "3.7"): ({80}, CHUNK),
    ("rms_norm_fwd_chunked_kernel", "N=65536 weight stats", "fp32", "3.9"): ({90}, CHUNK),
    ("rms_norm_bwd_kernel", "N=64 rows=32 weight need dx need dw", "bf16", "3.7"): ({90}, "80 registers became 113" + GRID),
    ("rms_norm_bwd_kernel", "N=1000 transposed weight need dx need dw", "bf16", "3.9"): ({90}, "64 registers became 88" + GRID),
    ("rms_norm_bwd_kernel", "N=4096 frozen weight weight need dx", "bf16", "3.7"): ({120}, CHUNK + "; its grid has 2 an SM"),
    ("layer_norm_fp8_chunked_kernel", "N=16384 weight bias", "fp32", "3.7"): ({120}, ROW),
    ("layer_norm_fp8_kernel", "N=197 rows=16 weight bias", "bf16", "3.7"): ({80}, FEW),
    ("layer_norm_fp8_kernel", "N=197 rows=16 weight bias", "fp32", "3.7"): ({80}, FEW),
    ("layer_norm_fp8_kernel", "N=8192 weight bias", "bf16", "3.9"): ({90}, CHUNK),
    ("softmax_bwd_chunked_kernel", "N=65536 to fp32", "bf16", "3.9"): ({90}, CHUNK),
    ("softmax_fwd_chunked_kernel", "N=65536 odd address", "bf16", "3.7"): ({120}, CHUNK),
    ("gated_linear_fwd_kernel", "64x32x32 odd gelu bg bu save pre", "bf16", "3.7"): ({120}, "168 registers became 190; odd strides only"),
    ("gated_linear_fwd_kernel", "64x32x32 odd sizes gelu bg bu save pre", "bf16", "3.7"): ({120}, "168 registers became 190; odd strides only"),
    ("softmax_fwd_kernel", "N=197 rows=16", "fp32", "3.7"): ({90}, "48 registers became 72; 7 programs of 4 warps remain"),
    ("linear_dact_kernel", "128x64x32 gelu_tanh need db", "bf16", "3.7"): ({90}, "80 registers became 88; not the tile of TMA"),
    ("gate_bwd_kernel", "N=14335 odd gelu need db P=i32", "bf16", "3.9"): ({90}, "80 registers became 112; odd strides only"),
    ("linear_dact_kernel", "128x64x32 gelu need db", "bf16", "3.7"): ({90}, "not the tile of TMA"),
    ("linear_fwd_kernel", "128x128x32 frozen weight gelu save pre", "bf16", "3.8"): ({90}, POINTERS),
    ("linear_fwd_kernel", "128x128x32 gelu bias save pre", "bf16", "3.8"): ({90}, POINTERS),
    ("linear_fwd_kernel", "128x128x32 gelu bias save pre", "fp16", "3.8"): ({90}, POINTERS),
    ("linear_fwd_kernel", "128x128x32 transposed gelu bias save pre", "bf16", "3.8"): ({90}, POINTERS),
    ("linear_fwd_kernel", "64x128x64 gelu bias scale N=i32 stride_ym=i32", "fp8e4nv", "3.9"): ({90}, POINTERS),
    ("linear_split_k_kernel", "64x64x128", "bf16", "3.7"): ({90}, STAGES),
    ("linear_split_k_kernel", "64x64x256", "fp8e4nv", "3.7"): ({90}, STAGES),
    ("softmax_fwd_chunked_kernel", "N=262143 edges", "fp32", "3.9"): ({90}, CHUNK + "; its grid has 2 an SM at most"),
    ("softmax_fwd_chunked_kernel", "N=65536", "fp32", "3.8"): ({90}, CHUNK + "; its grid has 2 an SM at most"),
}  # fmt: skip


def test_large_falls_from_one_triton_to_the_next_are_known() -> None:
    found: dict[tuple[str, str, str, str], set[int]] = {}
    for key, _, programs, after, left in occupancy.falls(occupancy.committed()):
        if left < LARGE * programs:
            found.setdefault((*key[:3], after), set()).add(key.arch)
    assert found == {known: architectures for known, (architectures, _) in KNOWN_FALLS.items()}
