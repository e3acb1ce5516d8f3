"""The demo's verdicts: what is outside its bound, not a number, or not measured does not pass."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from bench.demo import __main__ as demo
from bench.demo import kernels, rows
from bench.demo.rows import Row
from fused_ops import fuse


@pytest.mark.parametrize(
    ("measured", "relation", "bound", "passed", "missed_by"),
    [
        (1e-6, "<=", 1e-5, True, None),
        (1e-5, "<=", 1e-5, True, None),
        (3e-5, "<=", 1e-5, False, 2e-5),
        (13, "==", 13, True, None),
        (12, "==", 13, False, 1),
        (5, ">=", 7, False, 2),
        (math.inf, "<=", 1e-5, False, math.inf),
        (None, "<=", 1e-5, False, None),
    ],
)
def test_verdict(measured: float | None, relation: str, bound: float, passed: bool, missed_by: float | None) -> None:
    row = Row("step", "check", measured, relation, bound)
    assert row.passed is passed
    assert row.missed_by == pytest.approx(missed_by) if missed_by is not None else row.missed_by is None
    assert ("ok" in row.verdict()) is passed


def test_nan_never_passes() -> None:
    for relation in rows.RELATIONS:
        row = Row("step", "check", math.nan, relation, 0.0)
        assert not row.passed
        json.dumps(row.as_dict(), allow_nan=False)


def test_table_says_by_how_much() -> None:
    stream = io.StringIO()
    Console(file=stream, width=160).print(rows.table([Row("embed", "error [max]", 3e-5, "<=", 1e-5, "[note]")], "title"))
    assert "MISSED by 2.00e-05" in stream.getvalue()
    assert "error [max]" in stream.getvalue()
    assert "[note]" in stream.getvalue()


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path, steps: tuple) -> tuple[int, dict]:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "STEPS", steps)
    status = demo.main()
    return status, json.loads((tmp_path / "demo" / "report.json").read_text())


def test_exit_status_and_report(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    good = ("good", lambda _: [Row("good", "check", 1, "==", 1)])
    bad = ("bad", lambda _: [Row("bad", "check", 2, "<=", 1)])

    def broken(_: demo.Demo) -> list[Row]:
        raise RuntimeError("it broke")

    assert _run(monkeypatch, tmp_path, (good,))[0] == 0
    status, report = _run(monkeypatch, tmp_path, (bad, ("broken", broken), good))
    assert status == 1
    assert report["passed"] is False
    assert [row["passed"] for row in report["rows"]] == [False, False, True]
    assert report["rows"][0]["missed_by"] == 1
    assert "it broke" in report["rows"][1]["note"]


def test_gradient_error_finds_one_wrong_parameter() -> None:
    theirs = {"a": torch.ones(4), "b": torch.full((4,), 2.0), "zero": torch.full((4,), 1e-9)}
    assert kernels.worst_gradient(theirs, theirs) == (0.0, "a")
    error, name = kernels.worst_gradient(theirs | {"b": torch.full((4,), 2.02)}, theirs)
    assert name == "b"
    assert error == pytest.approx(0.01, rel=1e-3)
    assert kernels.worst_gradient(theirs | {"zero": torch.full((4,), 3e-9)}, theirs)[0] < 1e-5
    assert kernels.worst_gradient({"a": torch.ones(4)}, theirs)[0] == math.inf
    assert math.isnan(kernels.worst_gradient(theirs | {"a": torch.full((4,), math.nan)}, theirs)[0])


def test_kernel_rows_miss_where_aten_runs() -> None:
    """In this process CPU tensors go to ATen: the demo must say that no kernel ran."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU())
    fused = len(fuse(model).fused)
    with torch.no_grad(), kernels.counting() as calls:
        model(torch.randn(3, 8))
    operators, interpreted = kernels.operator_rows("step", "operators", calls, "fwd", fused, "")
    assert operators.passed
    assert operators.measured == 2
    assert not interpreted.passed
    assert interpreted.missed_by == 2
