"""The table of what kernels cost before and after, and how a peer's launches are noted."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from bench import kernel_table as module
from bench.__main__ import main
from fused_ops._tools.forecast.counted import Counted
from fused_ops._tools.headline import Row, headline_rows
from fused_ops._tools.headline_table import load, save

SOFTMAX = ("softmax", "4k", "bfloat16", "fwd")
BEFORE = Path(__file__).parents[2] / "bench" / "results" / "kernels-before-3.7.csv"
NORM = ("layer_norm", "8192x4096", "bfloat16", "bwd")


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    """(before, after): one kernel with fewer registers and instructions, and one that is now a single launch."""
    whole = load(BEFORE)
    before = {key: whole[key] for key in (SOFTMAX, NORM)}
    (one,) = before[SOFTMAX]
    faster = dataclasses.replace(one, registers=16, programs_per_sm=16, instructions=one.instructions // 2)
    save(before, tmp_path / "before.csv")
    save({SOFTMAX: [faster], NORM: before[NORM][:1]}, tmp_path / "after.csv")
    return tmp_path / "before.csv", tmp_path / "after.csv"


def _lines(text: str, name: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {name}")]


def test_before_and_after_stand_side_by_side(tables: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tables
    assert main(["kernels", "--before", str(before), "--after", str(after)]) == 0
    text = capsys.readouterr().out
    (one,) = load(before)[SOFTMAX]
    ((row, kernel, registers, spill, programs, instructions, *_),) = _lines(text, "softmax 4k")
    assert (row, kernel, spill) == ("softmax 4k fwd", "softmax_fwd", "0")
    assert registers == f"{one.registers} -> 16"
    assert programs == f"{one.programs_per_sm} -> 16"
    assert instructions == f"{one.instructions_per_element:.4g} -> {one.instructions_per_element / 2:.4g}"
    assert len(_lines(text, "layer_norm 8192x4096 bwd")) == 1


def test_a_row_of_several_kernels_has_a_line_each(tables: tuple[Path, Path], tmp_path: Path) -> None:
    before, _ = tables
    out = tmp_path / "table.md"
    assert main(["kernels", "--after", str(before), "--only", "layer_norm-8192x4096", "--out", str(out)]) == 0
    text = out.read_text()
    assert "2 kernels" in _lines(text, "layer_norm 8192x4096 bwd")[0][1]
    assert [cells[1] for cells in _lines(text, " |")] == ["layer_norm_bwd", "column_sum"]
    assert "softmax" not in text


def test_a_peer_that_is_forecast_faster_is_named() -> None:
    row = next(row for row in headline_rows() if row.key == SOFTMAX)
    ours = load(BEFORE)[SOFTMAX]
    theirs = [dataclasses.replace(ours[0], kernel="_theirs", moved=1, bytes=1 << 20)]
    for liger, said in (({SOFTMAX: theirs}, "Liger's forecast is faster on:"), ({SOFTMAX: ours}, "faster on no row")):
        text = "\n".join(module._text([row], {}, {SOFTMAX: ours}, liger, module.GPUS["h100"], "3.7"))
        assert said in text
        assert "Liger: softmax 4k fwd" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "h300"], "--gpu: got h300"),
        (["--only", "nothing-like-this"], "no headline row matches"),
        (["--before", "missing.csv", "--after", "missing.csv"], "missing.csv: no such table"),
    ],
)
def test_what_there_is_no_table_of_is_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *args]) == 2
    assert message in capsys.readouterr().err


PEER = """
import torch, triton, triton.language as tl
@triton.jit
def _peer_kernel(y_ptr, x_ptr, stride, n, dtype: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=tl.arange(0, BLOCK) < n, other=0.0).to(dtype), mask=tl.arange(0, BLOCK) < n)
def softmax(x):
    y = torch.empty_like(x)
    _peer_kernel[lambda meta: (x.shape[0], 2)](y, x, x.stride(0), x.shape[1], dtype=tl.bfloat16, BLOCK=4096, num_warps=8)
    return y
def counts_sms(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 1
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with Liger's name and modules, whose softmax is a kernel of its own."""
    ops, functional = tmp_path / "liger_kernel" / "ops", tmp_path / "liger_kernel" / "transformers"
    for folder in (ops, functional):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    for name in ("layer_norm", "rms_norm"):
        (ops / f"{name}.py").write_text(PEER)
    (functional / "functional.py").write_text("from ..ops.layer_norm import softmax as liger_softmax, counts_sms\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
@pytest.mark.xdist_group("audit")
def test_a_peers_launches_are_noted_and_counted_as_ours_are(peer: Path) -> None:
    from bench.peer_launches import _noting, add_path, liger_launches
    from fused_ops._tools.headline import SXM
    from fused_ops._tools.headline_table import count_launches

    add_path(peer)
    rows: list[Row] = [
        row for row in headline_rows() if row.key in (SOFTMAX, ("linear", "bert_base_fc1_gelu", "bfloat16", "fwd"))
    ]
    found = liger_launches(rows)
    assert list(found) == [SOFTMAX]  # Liger has no linear
    ((launch,),) = found.values()
    assert (launch.kernel, launch.grid) == ("_peer_kernel", 2 * 4096)
    counted, _ = count_launches(found, jobs=1)
    (one,) = counted[SOFTMAX]
    assert isinstance(one, Counted)
    assert one.bytes == 2 * 2 * 4096 * 4096
    assert one.moved == 2 * 2 * 4096
    with _noting([], SXM):
        import torch
        from liger_kernel.ops.layer_norm import counts_sms  # type: ignore[import-not-found]

        assert counts_sms(torch.empty(1)) == SXM.sms


def test_a_folder_without_the_peer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.peer_launches import add_path

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(ValueError, match="pip install --no-deps --target"):
        add_path(tmp_path)
