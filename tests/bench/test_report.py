"""Pictures and page from a made-up CSV: everything is drawn, labelled, and no label lies on another. Comparison of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from tests.bench.synthetic import write_synthetic

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


def test_page_says_what_matters(tmp_path: Path) -> None:
    only = write_synthetic(tmp_path / "results.csv", only="softmax.*bf16-fwd-")
    assert main(["report", str(only), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("SYNTHETIC GPU", "copy: 3000 GB/s", "helion is not installed", "relative error 0.5", "90% of the limit"):
        assert text in page
    pictures = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert pictures == [
        "ratio_kernel_softmax_fwd_bf16.png",
        "ratio_wall_softmax_fwd_bf16.png",
        "roofline_bf16.png",
        "speed_softmax_bf16.png",
    ]
    assert page.count("<img ") == len(pictures)
    assert not list(tmp_path.glob("out/*.tmp"))


@pytest.mark.parametrize("passes", ["fwd", pytest.param("fwd|bwd", marks=pytest.mark.slow)])
def test_pictures_are_labelled_and_legible(passes: str, tmp_path: Path) -> None:
    from bench.report.frame import load
    from bench.report.page import pictures
    from bench.report.style import plt

    results = write_synthetic(tmp_path / "results.csv", only=f"(softmax.*|layer_norm.*|_gelu)-bf16-({passes})-")
    drawn = 0
    for _, name, figure in pictures(load(results)):
        if figure is None:
            continue
        drawn += 1
        figure.canvas.draw()
        for panel in figure.axes:
            assert panel.get_xlabel(), f"{name}: x axis without a label"
            assert panel.get_title(), f"{name}: no title"
            for axis in (panel.xaxis, panel.yaxis):
                _no_overlap(name, [t for t in axis.get_ticklabels() if t.get_text()])
            _no_overlap(name, list(panel.texts))
        plt.close(figure)
    assert drawn >= 12


def _no_overlap(name: str, texts: list) -> None:
    """Unrotated texts: no box meets another. Rotated tick labels: their anchors are further apart than a line is high."""
    boxes = [t.get_window_extent() for t in texts]
    for (a, one), (b, two) in zip(zip(texts, boxes), list(zip(texts, boxes))[1:]):
        if a.get_rotation():
            assert abs(one.x1 - two.x1) >= a.get_fontsize(), f"{name}: {a.get_text()!r} lies on {b.get_text()!r}"
        else:
            assert not one.shrunk(0.98, 0.9).overlaps(two.shrunk(0.98, 0.9)), (
                f"{name}: {a.get_text()!r} lies on {b.get_text()!r}"
            )


def test_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err


def test_compare_finds_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = "softmax-4k-bf16"
    before = write_synthetic(tmp_path / "a.csv", only)
    same = write_synthetic(tmp_path / "b.csv", only, slowdown=1.04)
    slower = write_synthetic(tmp_path / "c.csv", only, slowdown=1.06)
    faster = write_synthetic(tmp_path / "d.csv", only, slowdown=0.5)
    assert main(["compare", str(before), str(same)]) == 0
    assert main(["compare", str(before), str(slower)]) == 1
    out = capsys.readouterr().out
    assert "REGRESSION softmax 4k bf16 fwd kernel ours" in out
    assert "liger" not in out
    assert main(["compare", str(before), str(faster)]) == 0
    assert main(["compare", str(before), str(slower), "--threshold", "0.1"]) == 0


def test_compare_names_what_went_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_synthetic(tmp_path / "a.csv", "softmax-(4k|8k)-bf16-fwd-")
    after = write_synthetic(tmp_path / "b.csv", "softmax-4k-bf16-fwd-")
    main(["compare", str(before), str(after)])
    out = capsys.readouterr().out
    assert "missing  softmax 8k bf16 fwd kernel ours" in out
    assert "1 missing" in out


def test_compare_of_unlike_runs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_synthetic(tmp_path / "a.csv", "softmax-4k-bf16-fwd")
    assert main(["compare", str(a), str(tmp_path / "none.csv")]) == 2
    assert main(["compare", str(a), str(tmp_path)]) == 2
    assert "no results at" in capsys.readouterr().err
