"""The headline rows' launches: how they are listed, what compiled ones cost, and the committed tables that hold them."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path

import pytest

from fused_ops._tools import headline_table
from fused_ops._tools.forecast import GPUS
from fused_ops._tools.forecast.counted import Counted
from fused_ops._tools.forecast.launched import columns, forecast_launches, launch_of
from fused_ops._tools.headline import Row, counting_case, headline_rows, launches_of
from fused_ops._tools.headline_table import Key, findings, load, save, table_of, unknown_rows, worse
from fused_ops._tools.launches import AtenCall, Launch
from fused_ops._tools.occupancy import VERSIONS

H100 = GPUS["h100"]
ROWS = {" ".join(row.key): row for row in headline_rows()}
QUICK = (
    "softmax 4k bfloat16 fwd", "softmax vit_large_attention bfloat16 bwd", "layer_norm 16384x768 bfloat16 bwd",
    "rms_norm 8192x4096 bfloat16 fwd", "linear decode_16_gelu bfloat16 fwd",
)  # fmt: skip
PARTS = [pytest.param(True, id="few"), pytest.param(False, id="all", marks=pytest.mark.slow)]
compiles = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")


def _row(name: str) -> Row:
    return ROWS[name]


def test_a_pass_is_what_it_launches_alone() -> None:
    fwd, bwd, both = ([one.kernel for one in launches_of(_row(f"layer_norm 140x4096 bfloat16 {p}")) if isinstance(one, Launch)]
                      for p in ("fwd", "fwd+bwd", "fwd+bwd"))  # fmt: skip
    assert fwd == ["layer_norm_fwd_kernel"]
    assert bwd == both == ["layer_norm_fwd_kernel", "layer_norm_bwd_kernel", "column_sum_kernel"]
    alone = launches_of(_row("layer_norm 8192x4096 bfloat16 bwd"))
    assert [one.kernel for one in alone if isinstance(one, Launch)] == ["layer_norm_bwd_kernel", "column_sum_kernel"]


def test_atens_kernels_are_listed_beside_ours() -> None:
    """A linear's backward: dpre by a kernel of ours, then two products of cuBLAS."""
    M, N, K = _row("linear bert_base_fc1_gelu bfloat16 bwd").case.shape
    found = launches_of(_row("linear bert_base_fc1_gelu bfloat16 bwd"))
    products = [one for one in found if isinstance(one, AtenCall) and one.product]
    assert [one.product for one in products] == [(M, K, N), (N, K, M)]
    assert products[0].nbytes == 2 * (M * N + N * K + M * K)
    assert not [one for one in found if isinstance(one, AtenCall) and not one.product]


def test_a_case_to_count_has_the_launchs_sizes() -> None:
    (launch,) = launches_of(_row("softmax 4k bfloat16 fwd"))
    assert isinstance(launch, Launch)
    said = counting_case(launch)["launch"]
    assert (said["grid"], said["values"]["M"], said["values"]["N"]) == (launch.grid, 4096, 4096)
    assert said["bytes"] == {"x_ptr": 2 * 4096 * 4096, "y_ptr": 2 * 4096 * 4096}
    assert said["elements"] == 4096 * 4096


def test_a_cluster_counts_as_its_programs() -> None:
    launch = Launch("fused_ops.kernels.softmax.softmax_packed", "softmax_fwd_packed_kernel", 7, (), (("num_ctas", 8),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_ops._tools.headline.case_of", lambda *_: {"num_ctas": 8, "constexprs": {}})
        assert counting_case(launch)["launch"]["grid"] == 56


@functools.cache
def counted(few: bool) -> tuple[headline_table.HeadlineTable, str]:
    """Counted by this Triton, or by that of FUSED_OPS_TEST_PYTHON."""
    rows = [_row(name) for name in QUICK] if few else headline_rows()
    return headline_table.count(rows, jobs=2, python=os.environ.get("FUSED_OPS_TEST_PYTHON"))


@compiles
@pytest.mark.xdist_group("audit")
@pytest.mark.parametrize("few", PARTS)
def test_compiled_kernels_cost_no_more_than_the_table_says(few: bool) -> None:
    found, triton = counted(few)
    assert len(found) >= len(QUICK)
    table = load(table_of(triton))
    if not table:
        pytest.skip(f"no table of Triton {triton}: fused-ops audit --headline --write-table")
    assert findings(found, table) == []


@compiles
@pytest.mark.xdist_group("audit")
@pytest.mark.parametrize("few", PARTS)
def test_everything_that_steers_a_kernel_is_counted(few: bool) -> None:
    """No branch that counting could not decide, no spill, and every kernel moves the bytes of its tensors at the least."""
    for launches in counted(few)[0].values():
        for one in launches:
            _is_whole(one)


def _is_whole(one: Counted) -> None:
    if not one.is_aten:
        assert one.unknown <= 1, one
        assert one.instructions > 50
        assert 1.0 <= one.uneven < 1.5, one
        assert one.copied or one.moved * one.grid >= 0.8 * one.bytes or one.bytes < 1 << 24, one
        assert one.copied == 0 or one.flops > 0


@compiles
@pytest.mark.xdist_group("audit")
def test_rows_are_read_once_by_a_kernel_of_one_pass() -> None:
    found, _ = counted(True)
    (one,) = found["softmax", "4k", "bfloat16", "fwd"]
    assert (one.bytes, one.read, one.again, one.apart) == (2 * 2 * 4096 * 4096, 2 * 4096 * 4096, 0, 0)
    assert one.moved * one.grid == one.bytes
    assert columns(one, H100).l2_footprint_bytes == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_has_the_headline_rows_and_no_others(version: str) -> None:
    table = load(headline_table.FOLDER / f"headline-{version}.csv")
    if not table:
        pytest.skip(f"no table of Triton {version}")
    assert unknown_rows(table) == []
    assert set(table) == {row.key for row in headline_rows()}
    for key, launches in table.items():
        for one in launches:
            _is_whole(one)
        now = launches_of(_row(" ".join(key))) if " ".join(key) in QUICK else []
        if now:
            assert [one.kernel for one in launches if not one.is_aten] == [o.kernel for o in now if isinstance(o, Launch)]


ONE = Counted("k", grid=264, registers=32, programs_per_sm=2, num_warps=8, rows=528, elements=1 << 20, bytes=4 << 20, read=2 << 20,
              instructions=1000, in_flight=8192, barriers=8, moved=16384, waits=2)  # fmt: skip
KEY: Key = ("softmax", "4k", "bfloat16", "fwd")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"registers": 64}, ""),  # an SM holds as many
        (
            {"registers": 64, "programs_per_sm": 1, "in_flight": 16384},
            "holds 1 programs, 2 by the table (32 registers became 64)",
        ),
        ({"spill_bytes": 8}, "spills 8 bytes a thread, 0 by the table"),
        ({"instructions": 1040}, ""),
        ({"instructions": 1060}, "68.3 instructions an element, 64.5 by the table"),
        ({"num_warps": 4, "instructions": 1900}, ""),
        ({"barriers": 9}, "4.50 barriers a row, 4.00 by the table"),
        ({"in_flight": 4096}, "8192 bytes on the way an SM, 16384 by the table"),
        ({"instructions": 500, "barriers": 2, "in_flight": 16384, "programs_per_sm": 4}, ""),
    ],
)
def test_what_costs_more_is_a_finding(change: dict, said: str) -> None:
    found = worse(ONE, dataclasses.replace(ONE, **change))
    assert (len(found), said in "".join(found)) == (bool(said), True)
    named = findings({KEY: [dataclasses.replace(ONE, **change)]}, {KEY: [ONE]})
    assert [(key, kernel) for key, kernel, _ in named] == [(KEY, "k")] * bool(said)


def test_other_kernels_than_the_tables_are_a_finding() -> None:
    for table in ({}, {KEY: [ONE, ONE]}, {KEY: [dataclasses.replace(ONE, kernel="other")]}):
        ((key, kernel, said),) = findings({KEY: [ONE]}, table)
        assert (key, kernel) == (KEY, "k")
        assert "--write-table" in said


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    assert load(path) == {}
    table = {KEY: [ONE, Counted.aten("mm", 100, 2, (3, 4, 5))]}
    save(table, path)
    assert load(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
    path.write_text(path.read_text().replace(",264,", ",many,"))
    with pytest.raises(ValueError, match=r"table\.csv: line 2: .*'many'"):
        load(path)


# What a study reckoned by hand from the same kernels' machine code, in microseconds on an H100, before this table was made faster.
STUDY = {
    "softmax vit_large_attention bfloat16 fwd": 93, "softmax vit_large_attention bfloat16 bwd": 90,
    "softmax gpt2_vocabulary bfloat16 fwd": 806, "softmax gpt2_vocabulary bfloat16 bwd": 1168,
    "softmax 64k bfloat16 fwd": 876, "softmax llama3_vocabulary bfloat16 fwd": 1029, "layer_norm 16384x768 bfloat16 bwd": 46,
}  # fmt: skip


@pytest.mark.parametrize("name", STUDY)
def test_the_forecast_is_that_of_the_study(name: str) -> None:
    before = Path(__file__).parents[2] / "bench" / "results" / "kernels-before-3.7.csv"
    launches = load(before)[_row(name).key]
    assert forecast_launches(launches, H100).seconds * 1e6 == pytest.approx(STUDY[name], rel=0.12)


def test_each_limit_follows_its_count() -> None:
    base = dataclasses.replace(ONE, elements=1 << 26, bytes=1 << 28, read=1 << 27, grid=26400, rows=26400)
    before = launch_of(base, H100)
    for change, limit in (
        ({"bytes": 1 << 29}, "memory"), ({"again": 1 << 27, "apart": 1 << 24}, "memory"), ({"instructions": 2000}, "issue"),
        ({"mufu": 400}, "special functions"), ({"waits": 4}, "in flight"), ({"moved": 1 << 20}, "L2"),
    ):  # fmt: skip
        after = launch_of(dataclasses.replace(base, **change), H100)
        assert after.limits[limit] > before.limits[limit], limit
        assert after.seconds > before.seconds
    found = launch_of(dataclasses.replace(base, again=1 << 27, apart=1), H100)
    assert found.limits["memory"] == before.limits["memory"]  # what is read again is still in L2
    alone = launch_of(dataclasses.replace(base, programs_per_sm=1), H100)
    assert "chain" in alone.limits
    assert "chain" not in before.limits


def test_a_second_stage_reads_from_l2() -> None:
    stage = dataclasses.replace(ONE, grid=48, elements=400_000, bytes=3_000_000, read=3_000_000, moved=60_000)
    first, second = forecast_launches([ONE, stage], H100).launches
    assert launch_of(stage, H100).limits["memory"] > 0
    assert second.limits["memory"] == 0
    assert first.limits["memory"] > 0
    large = dataclasses.replace(stage, bytes=100_000_000)
    assert forecast_launches([ONE, large], H100).launches[1].limits["memory"] > 0


def test_an_epilogue_costs_time_where_a_program_is_alone() -> None:
    tile = Counted("p", grid=132, num_warps=8, programs_per_sm=1, elements=1 << 24, bytes=1 << 26, instructions=60000, outside=30000,
                   flops=2**31, copied=2**25)  # fmt: skip
    alone = launch_of(tile, H100).limits["tensor"]
    both = launch_of(dataclasses.replace(tile, programs_per_sm=2, grid=264, flops=2**30, copied=2**24, outside=15000), H100)
    assert alone > 1.1 * both.limits["tensor"]
    drained = launch_of(dataclasses.replace(tile, drained=20000), H100)
    assert drained.limits["tensor"] > alone


def test_aten_takes_its_bytes_or_its_products() -> None:
    add, product = Counted.aten("add", 3 << 28, 2, None), Counted.aten("mm", 3 << 27, 2, (8192, 8192, 8192))
    assert launch_of(add, H100).seconds == pytest.approx((3 << 28) / H100.copy / 0.9 + H100.launch)
    assert launch_of(product, H100).binding == "tensor"
    assert launch_of(product, H100).seconds > 2 * 8192**3 / H100.rates[2]
