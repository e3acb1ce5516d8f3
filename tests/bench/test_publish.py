"""python -m bench publish: made-up runs are checked, merged and filed; what was filed survives every failure."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bench import publish as publish_module
from bench.__main__ import main
from bench.figures import BEGIN, END
from bench.forecast import BAND, NEXT, read_forecast, residuals, said_of
from bench.publish import publish
from bench.record import KEY, read
from bench.results_format import ARCHIVE, FormatError
from fused_ops._runtime import tables
from tests.bench.synthetic import H100, write_run
from tests.bench.test_results_format import CONFIG, ENTRY, TUNED

ROWS = (
    "(softmax-(4k|8k)|layer_norm-8192x4096|linear-bert_base_fc1_gelu)-bf16-(fwd|bwd)-kernel|softmax-latency_140x4096-bf16-fwd-"
)
TEXT = f"# Title\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n"
LATER = {"call": "second", "started": "2000-01-01T01:00:00+00:00", "ended": "2000-01-01T01:10:00+00:00"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a README and the forecasts."""
    root = tmp_path / "checkout"
    (root / "fused_ops").mkdir(parents=True)
    (root / "README.md").write_text(TEXT)
    assert main(["forecast", "--root", str(root)]) == 0
    return root


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The report takes seconds: one test draws it."""
    if "draws" not in request.node.name:
        monkeypatch.setattr(publish_module, "_draw", lambda *_: None)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_is_filed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_run(tmp_path / "out", ROWS)
    assert main(["publish", str(out / ARCHIVE), "--root", str(root)]) == 0
    folder = root / "bench" / "results" / "h100"
    assert str(folder) in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {
        "results.csv", "correctness.csv", "benchmark.json", "machine.json", "summary.md", "forecast.csv", "residuals.csv",
        "counts.csv",
    }  # fmt: skip
    assert json.loads((folder / "machine.json").read_text())["calls"][0]["call"] == "first"
    benchmark = json.loads((folder / "benchmark.json").read_text())
    assert benchmark == {"machine_info": {"node": "", "gpu": H100}, "benchmarks": [{"name": "a", "stats": {"median": 1.0}}]}
    summary = (folder / "summary.md").read_text()
    for text in (
        "| probe | ok | 2 | all / well |",
        "1 passed, 1 failed.",
        "softmax_fwd_kernel it / broke here",
        "within 0.8 to 1.25",
    ):
        assert text in summary
    assert not list((root / "bench" / "results").glob(".*"))


def test_a_next_forecast_waits_until_the_filed_run_is_replaced(root: Path, tmp_path: Path) -> None:
    folder = publish([write_run(tmp_path / "a", ROWS)], root).folder
    before = (folder / "forecast.csv").read_bytes()
    assert main(["forecast", "--gpu", "h100", "--root", str(root)]) == 0
    assert (folder / "forecast.csv").read_bytes() == before == (folder / NEXT).read_bytes()
    (folder / NEXT).write_bytes(before.replace(b",memory,", b",issue,"))
    (folder / "counts.csv").write_text("of the kernels that ran")
    publish([write_run(tmp_path / "a", ROWS)], root)
    assert (folder / "forecast.csv").read_bytes() == before
    assert (folder / "counts.csv").read_text() == "of the kernels that ran"
    publish([write_run(tmp_path / "b", ROWS)], root, replace=True)
    assert b",issue," in (folder / "forecast.csv").read_bytes()
    assert not (folder / NEXT).exists()
    assert (folder / "counts.csv").read_text() != "of the kernels that ran"


def test_residuals_are_measured_over_forecast(root: Path, tmp_path: Path) -> None:
    def twice_the_forecast(row: dict[str, str]) -> None:
        expected = forecast.get(tuple(row[k] for k in KEY))
        if row["provider"] == "ours" and expected:
            row.update(p20_us=str(2 * expected), p50_us=str(2 * expected), p80_us=str(2 * expected))

    folder = root / "bench" / "results" / "h100"
    forecast = {tuple(r[k] for k in KEY): float(r["forecast_us"]) for r in read_forecast(folder / "forecast.csv")}
    before = (folder / "forecast.csv").read_bytes()
    publish([write_run(tmp_path / "out", ROWS, change=twice_the_forecast)], root)
    with (folder / "residuals.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"softmax", "layer_norm", "linear"}
    assert {row["kind"] for row in rows} == {"kernel", "wall"}
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(2, rel=1e-3)
        assert float(row["measured_us"]) == pytest.approx(2 * float(row["forecast_us"]), rel=1e-3)
    assert (folder / "forecast.csv").read_bytes() == before
    assert f"0 of {len(rows)} forecasts" in "\n".join(said_of(rows))


def test_only_right_times_of_ours_have_residuals() -> None:
    key = {"op": "a", "case": "b", "dtype": "bf16", "pass": "fwd", "kind": "kernel"}
    forecast = [key | {"forecast_us": "10", "binding": "memory", "model": "1", "kernels": "x"}]
    ours = key | {"provider": "ours", "status": "ok", "p50_us": "9"}
    assert [row["ratio"] for row in residuals(forecast, [ours, ours | {"provider": "eager", "p50_us": "1"}])] == ["0.900"]
    assert residuals(forecast, [ours | {"status": "wrong", "p50_us": ""}]) == []
    assert said_of([]) == []
    assert BAND[0] < 1 < BAND[1]


def test_two_calls_are_one(root: Path, tmp_path: Path) -> None:
    """The later of equal measurements counts, whatever the order they are given in; ratios are made anew."""

    def without_helion(row: dict[str, str]) -> None:
        row.update(provider="helion") if row["provider"] == "quack" else None

    def skip_eager(row: dict[str, str]) -> None:
        row.update(status="skipped", p20_us="", p50_us="", p80_us="") if row["provider"] == "eager" else None

    def both(row: dict[str, str]) -> None:
        skip_eager(row)
        without_helion(row)

    first = write_run(tmp_path / "a", "softmax-(4k|8k)-bf16-fwd-kernel")
    second = write_run(tmp_path / "b", "softmax-4k-bf16-fwd-kernel", slowdown=3.0, change=both, **LATER)
    publish([second, first], root)
    rows = read(root / "bench" / "results" / "h100" / "results.csv")
    found = {(*(r[k] for k in KEY), r["provider"]): r for r in rows if r["kind"] == "kernel"}
    assert len(found) == len([r for r in rows if r["kind"] == "kernel"])
    times = {case: float(found["softmax", case, "bf16", "fwd", "kernel", "ours"]["p50_us"]) for case in ("4k", "8k")}
    assert times["4k"] > times["8k"], "ours of the second call, three times as slow"
    assert found["softmax", "4k", "bf16", "fwd", "kernel", "eager"]["status"] == "ok", "a skip says nothing"
    ours = found["softmax", "4k", "bf16", "fwd", "kernel", "ours"]
    fastest = min(float(r["p50_us"]) for k, r in found.items() if k[1] == "4k" and r["role"] == "peer" and r["status"] == "ok")
    assert float(ours["ratio_to_best_peer"]) == pytest.approx(fastest / float(ours["p50_us"]), rel=1e-3)
    assert not [r for r in rows if r["status"] == "absent" and r["provider"] == "helion"], "it was there in the second call"
    assert len([r for r in rows if r["kind"] == "roofline"]) == 8
    calls = json.loads((root / "bench" / "results" / "h100" / "machine.json").read_text())["calls"]
    assert [call["call"] for call in calls] == ["first", "second"]


def test_a_wrong_result_replaces_a_time(root: Path, tmp_path: Path) -> None:
    def wrong(row: dict[str, str]) -> None:
        row.update(status="wrong", p20_us="", p50_us="", p80_us="") if row["provider"] == "ours" else None

    runs = [
        write_run(tmp_path / "a", "softmax-4k-bf16-fwd-kernel"),
        write_run(tmp_path / "b", "softmax-4k-bf16-fwd-kernel", change=wrong, **LATER),
    ]
    publish(runs, root)
    readme = (root / "README.md").read_text()
    assert "Not timed: softmax 4k bf16 fwd kernel (wrong)." in readme
    assert "| softmax |" not in readme


def test_what_is_filed_is_added_to_or_replaced_when_asked(root: Path, tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", "softmax-4k-bf16-fwd-kernel")
    second = write_run(tmp_path / "b", "softmax-8k-bf16-fwd-kernel", **LATER)
    results = root / "bench" / "results" / "h100" / "results.csv"

    def cases() -> set[str]:
        return {row["case"] for row in read(results) if row["op"] == "softmax" and row["status"] == "ok"}

    publish([first], root)
    with pytest.raises(FormatError, match="--add to keep them, or --replace"):
        publish([second], root)
    assert cases() == {"4k"}
    publish([second], root, add=True)
    assert cases() == {"4k", "8k"}
    whole = files(root)
    publish([first, second], root)
    publish([second], root, add=True)
    assert files(root) == whole, "publishing again changes nothing"
    publish([second], root, replace=True)
    assert cases() == {"8k"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu", "NVIDIA H200"), ("torch", "2.12.0"), ("triton", "3.7.0"), ("capability", "9.1")],
)
def test_runs_that_differ_are_never_merged(root: Path, tmp_path: Path, name: str, value: str) -> None:
    before = files(root)
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **LATER, **{name: value})]
    with pytest.raises(FormatError, match=rf"machine\.json: {name}: the runs differ"):
        publish(runs, root)
    assert files(root) == before
    if name != "gpu":
        publish(runs[:1], root)
        with pytest.raises(FormatError, match=rf"machine\.json: {name}: the runs differ"):
            publish(runs[1:], root, add=True)


@pytest.mark.parametrize(
    ("commit", "why"), [("", "does not say its commit: give --commit"), ("abc1234+", "a checkout with changes")]
)
def test_a_run_says_its_commit(root: Path, tmp_path: Path, commit: str, why: str) -> None:
    run = write_run(tmp_path / "a", commit=commit)
    before = files(root)
    with pytest.raises(FormatError, match=why):
        publish([run], root)
    assert files(root) == before
    if not commit:
        publish([run], root, commit="def5678")
        assert {row["commit"] for row in read(root / "bench" / "results" / "h100" / "results.csv")} == {"def5678"}


@pytest.mark.parametrize("where", ["summary", "_tuned", "_benchmark", "table"])
def test_a_failure_leaves_everything_as_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    publish([write_run(tmp_path / "a", tuned=TUNED)], root)
    before = files(root)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(publish_module, where, fail)
    later = write_run(tmp_path / "b", slowdown=2.0, tuned=TUNED, **LATER)
    assert main(["publish", str(later), "--add", "--root", str(root)]) == 2
    assert files(root) == before
    assert not list((root / "bench" / "results").glob(".*"))


def test_a_move_that_fails_is_taken_back(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish([write_run(tmp_path / "a")], root)
    before = files(root)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target.name == "h100" and not self.name.endswith(".old"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        publish([write_run(tmp_path / "b", slowdown=2.0, **LATER)], root, add=True)
    assert files(root) == before


def test_refused_files_are_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    (run / "machine.json").write_text("{}")
    before = files(root)
    assert main(["publish", str(run), "--root", str(root)]) == 2
    assert f"{run}: machine.json: format" in capsys.readouterr().err
    assert files(root) == before


def test_the_tuned_table_is_one_that_is_loaded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name and with the content that the library reads; two calls' entries in one."""
    other = ENTRY | {"N": 8192, "config": CONFIG | {"block_n": 8192}}
    faster = ENTRY | {"config": CONFIG | {"num_warps": 16}}
    runs = [
        write_run(tmp_path / "a", tuned=TUNED | {"entries": [ENTRY, other]}),
        write_run(tmp_path / "b", tuned=TUNED | {"entries": [faster]}, **LATER),
    ]
    publish(runs, root)
    monkeypatch.setattr(tables, "_PACKAGE", root / "fused_ops")
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path / "none")
    loaded = tables.load(tables.Machine(H100, "3.6.0"))
    assert {key.N: config.num_warps for key, config in loaded.items()} == {4096: 16, 8192: 8}


def test_a_table_of_other_kernels_is_not_shipped(root: Path, tmp_path: Path) -> None:
    stale = ENTRY | {"N": 8192, "source": "0" * 64, "config": CONFIG | {"block_n": 8192}}
    done = publish([write_run(tmp_path / "a", tuned=TUNED | {"entries": [stale]})], root)
    assert any("tuned.json: 1 entries: source: not that of the kernels" in warning for warning in done.warnings)
    assert not (root / "fused_ops" / "configs").exists()
    publish([write_run(tmp_path / "b", tuned=TUNED | {"entries": [stale, ENTRY]}, **LATER)], root, add=True)
    (shipped,) = (root / "fused_ops" / "configs").iterdir()
    assert json.loads(shipped.read_text())["entries"] == [ENTRY]


def test_readmes_figures_are_rewritten_between_the_markers(root: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS)
    publish([run], root)
    text = (root / "README.md").read_text()
    assert text.startswith(f"# Title\n\nbefore\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    for said in (
        f"**{H100}**",
        "torch 2.11.0",
        "Triton 3.6.0",
        "commit abc1234",
        "2000-01-01",
        "`bench/gpu.sh OUT --call first`",
    ):
        assert said in text
    rows = {
        (r["case"], r["pass"], r["kind"], r["provider"]): r for r in read(root / "bench" / "results" / "h100" / "results.csv")
    }
    ours, eager = (rows["4k", "fwd", "kernel", name] for name in ("ours", "eager"))
    ratio = float(eager["p50_us"]) / float(ours["p50_us"])
    line = next(line for line in text.splitlines() if line.startswith("| softmax | 4k bf16"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:5] == ["4k bf16 (4096x4096)", "fwd", f"{float(ours['p50_us']):.4g}", f"{ratio:.2f}"]
    assert cells[5] == f"{float(ours['ratio_to_best_peer']):.2f} ({ours['best_peer']})"
    assert cells[6] == f"{float(ours['percent_of_limit']):.0f} %"
    assert "| fwd, wall time |" in text
    assert "64k" not in text, "only what was measured"
    publish([run], root)
    assert (root / "README.md").read_text() == text


def test_two_gpus_are_two_tables(root: Path, tmp_path: Path) -> None:
    publish([write_run(tmp_path / "a")], root)
    publish([write_run(tmp_path / "b", gpu="NVIDIA H200")], root)
    text = (root / "README.md").read_text()
    assert text.count("| op | case |") == 2
    assert text.index(H100) < text.index("NVIDIA H200")


def test_times_taken_in_two_ways_have_no_ratio(root: Path, tmp_path: Path) -> None:
    def by_events(row: dict[str, str]) -> None:
        row.update(method="events") if row["provider"] == "eager" else None

    publish([write_run(tmp_path / "a", "softmax-4k-bf16-fwd-kernel", change=by_events)], root)
    line = next(line for line in (root / "README.md").read_text().splitlines() if line.startswith("| softmax"))
    assert line.split("|")[5].strip() == ""


@pytest.mark.parametrize("text", ["# no markers\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n"])
def test_a_readme_without_markers_is_left_alone(root: Path, tmp_path: Path, text: str) -> None:
    (root / "README.md").write_text(text)
    done = publish([write_run(tmp_path / "a")], root)
    assert (root / "README.md").read_text() == text
    assert any("README.md has no" in warning for warning in done.warnings)


def test_any_gpu_is_filed(root: Path, tmp_path: Path) -> None:
    """Without a forecast there are no residuals, and it is said."""
    done = publish([write_run(tmp_path / "a", gpu="NVIDIA GeForce RTX 4090", capability="8.9")], root)
    assert done.folder.name == "geforce-rtx-4090"
    assert not (done.folder / "residuals.csv").exists()
    assert any("no forecast.csv" in warning for warning in done.warnings)


def test_correctness_alone_is_filed(root: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "results.csv").unlink()
    folder = publish([run], root).folder
    assert "1 passed, 1 failed." in (folder / "summary.md").read_text()
    assert read(folder / "results.csv") == []


def test_publish_draws_report_and_residuals(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    folder = publish([write_run(tmp_path / "a", "softmax-4k-bf16-(fwd|bwd)-kernel")], root).folder
    assert "abc1234" in (folder / "report.html").read_text()
    pictures = {path.name for path in folder.glob("*.png")}
    assert {"residuals.png", "speed_softmax_bf16.png"} <= pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_the_picture_shows_every_residual() -> None:
    pytest.importorskip("matplotlib")
    from bench.report.residuals import residual_picture
    from bench.report.style import plt

    rows = [
        {"op": op, "forecast_us": f, "measured_us": m} for op, f, m in (("a", "10", "12"), ("a", "100", "90"), ("b", "5", "9"))
    ]
    figure = residual_picture(rows, "a GPU")
    assert figure is not None
    panel = figure.axes[0]
    drawn = sorted(tuple(point) for dots in panel.collections[1:] for point in dots.get_offsets())
    assert drawn == [(5, 9), (10, 12), (100, 90)]
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    assert [panel.get_xlabel(), panel.get_title()] == ["forecast (us)", "Forecast and measured, a GPU"]
    plt.close(figure)
    assert residual_picture([], "a GPU") is None


def test_an_unknown_gpu_has_no_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "--gpu", "h300", "--root", str(tmp_path)]) == 2
    assert "allowed: h100, h200, all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('File "/a/torch/.venv/lib/python3.12/site-packages/torch/x.py", line 3', 'File ".../x.py", line 3'),
        ("no file (/a/me/a b/c.json)", "no file (.../a b/c.json)"),
        ("see https://docs.nvidia.com/cuda/index.html for it", "see https://docs.nvidia.com/cuda/index.html for it"),
        ("tests/gpu/test_1.py::test_x[a/b]: 3 bytes/s", "tests/gpu/test_1.py::test_x[a/b]: 3 bytes/s"),
    ],
)
def test_messages_are_filed_without_the_machines_folders(text: str, said: str) -> None:
    assert publish_module.without_folders(text) == said
