"""Coefficients are fitted to what was measured: they are found again where they are known, and the committed ones are the fit's."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.fit import FITTED, Measured, errors, evaluate, fit, fit_folder, measured_rows, said
from fused_ops._tools.forecast import GPUS
from fused_ops._tools.forecast.launched import forecast_launches
from fused_ops._tools.headline_table import load

H200 = Path(__file__).parents[2] / "bench" / "results" / "h200"
START = GPUS["h100"]
TRUE = dataclasses.replace(START, latency=1.1e-6, issue_share=0.65, l2_share=0.4, norm=6.0, launch=3e-6, host=2.0)


def _measured(gpu: object, noise: float = 0.0) -> list[Measured]:
    """The rows of a real run with times that a GPU of those coefficients would have."""
    rng = np.random.default_rng(0)
    rows = []
    for row in measured_rows(H200):
        seconds = forecast_launches(row.launches, gpu, row.op, row.pass_, row.kind == "wall").seconds  # type: ignore[arg-type]
        rows.append(row._replace(seconds=seconds * float(np.exp(noise * rng.standard_normal()))))
    return rows


def test_coefficients_are_found_again() -> None:
    found = fit(_measured(TRUE), START)
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name
    assert (found.copy, found.rates, found.sms) == (START.copy, START.rates, START.sms)


def test_what_is_not_asked_for_stays() -> None:
    found = fit(_measured(TRUE), START, ("host",))
    assert found.host == pytest.approx(2.0, rel=0.05)
    assert dataclasses.replace(found, host=START.host) == START


def test_a_fit_that_sees_nothing_is_no_better() -> None:
    """Rows that the start forecasts but for noise: a fit of one coefficient cannot forecast the noise of rows held out."""
    found = evaluate(_measured(START, noise=0.05), START, ("issue_share",))
    assert found.held >= 0.95 * found.before
    assert found.inside_before == found.rows
    assert found.fitted.issue_share == pytest.approx(START.issue_share, rel=0.2)


def test_rows_held_out_tell_a_good_fit() -> None:
    found = evaluate(_measured(TRUE), START, ("norm", "host", "latency"))
    assert found.better
    assert found.held < 0.8 * found.before
    assert "better on rows held out" in said(found)


def test_the_h200s_coefficients_are_those_of_its_rows() -> None:
    """norm and host: a fit from the committed ones stays where it is, and the rows it was made of are forecast."""
    rows = measured_rows(H200)
    assert len(rows) == 58
    gpu = GPUS["h200"]
    again = fit(rows, gpu, ("norm", "host"))
    assert (again.norm, again.host) == (pytest.approx(gpu.norm, rel=0.02), pytest.approx(gpu.host, rel=0.02))
    ratios = np.exp(errors(rows, gpu))
    assert np.sum((ratios >= 0.8) & (ratios <= 1.25)) >= 50


def test_kernels_that_nothing_was_fitted_to_are_forecast() -> None:
    """Liger's, counted as ours are, and measured in the same run. What is off spills, or works through rows in few warps."""
    table = load(H200.parent / "kernels-liger-3.7.csv")
    with (H200 / "results.csv").open(newline="") as file:
        timed = [
            row for row in csv.DictReader(file) if (row["provider"], row["kind"], row["status"]) == ("liger", "kernel", "ok")
        ]
    rows = [
        Measured(row["op"], row["case"], row["pass"], "kernel", tuple(launches), float(row["p50_us"]) * 1e-6)
        for row in timed
        if (launches := table.get((row["op"], row["case"], "bfloat16", row["pass"]))) and row["dtype"] == "bf16"
    ]
    ratios = np.exp(errors(rows, GPUS["h200"]))
    assert len(rows) >= 20
    assert np.mean((ratios >= 0.8) & (ratios <= 1.25)) >= 0.75


def test_the_command_says_what_it_would_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "h200", "--only", "host"]) == 0
    text = capsys.readouterr().out
    assert "58 measured rows of h200" in text
    assert "host" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "h300"], "no such GPU"),
        (["fit", "h100"], "no counts of the kernels that were measured"),
        (["fit", "h200", "--only", "copy"], "got copy, allowed: latency"),
    ],
)
def test_what_cannot_be_fitted_is_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_residuals_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "h200"
    folder.mkdir()
    (folder / "counts.csv").write_bytes((H200 / "counts.csv").read_bytes())
    with pytest.raises(OSError):
        fit_folder(folder)
