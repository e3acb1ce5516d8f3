"""The file that a run leaves: what is packed, and that every kind of damage to it is refused, by file and field."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from bench import results_format, results_load
from bench.environment import gpu_folder
from bench.record import COLUMNS
from bench.results_format import ARCHIVE, FILES, FormatError, machine_record, pack, write_machine
from bench.results_load import load
from fused_ops._runtime.tuned_kernels import source_hash
from tests.bench.synthetic import H100, MACHINE, write_run

CONFIG = {"block_m": 1, "block_n": 4096, "num_warps": 8, "variant": "one_pass", "num_stages": 1, "num_ctas": 1}
ENTRY = {
    "kernel": "softmax_fwd",
    "M": 4096,
    "N": 4096,
    "itemsize": 2,
    "microseconds": 20.0,
    "config": CONFIG,
    "source": source_hash("softmax_fwd"),
}
TUNED = {"gpu": H100, "triton": "3.6.0", "entries": [ENTRY]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "out", tuned=TUNED)


def test_folder_and_archive_hold_the_same(run: Path) -> None:
    folder, archive = load(run), load(run / ARCHIVE)
    assert folder.rows == archive.rows
    assert len(folder.rows) > 20
    assert folder.machine == archive.machine == MACHINE
    assert [row["outcome"] for row in archive.correctness] == ["passed", "failed"]
    assert archive.tuned == TUNED
    assert archive.benchmark is not None
    assert archive.summary == "# GPU run\n"


def test_a_folder_that_holds_only_its_archive_is_read(run: Path) -> None:
    for name in FILES:
        (run / name).unlink(missing_ok=True)
    assert load(run).machine == MACHINE


def test_the_hosts_name_is_nowhere(run: Path) -> None:
    with gzip.open(run / ARCHIVE) as stream:
        assert b"secret-host" not in stream.read()
    assert "secret-host" not in (run / "benchmark.json").read_text()
    with tarfile.open(run / ARCHIVE) as archive:
        assert {(m.uname, m.gname, m.uid, m.mtime) for m in archive} == {("", "", 0, 0)}


def test_packing_is_whole_and_says_what_it_cuts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_format, "LOG_BYTES", 100)
    monkeypatch.setattr(results_format, "MAX_BYTES", 100_000)
    (run / "log.txt").write_bytes(b"x" * 150 + b"the end")
    (run / "summary.md").write_bytes(b"y" * 100_001)
    (run / "else.bin").write_bytes(b"z")
    notes = pack(run)
    assert ["log.txt" in notes[1], "summary.md: left out" in notes[0], len(notes)] == [True, True, 2]
    with tarfile.open(run / ARCHIVE) as archive:
        assert "summary.md" not in archive.getnames()
        assert "else.bin" not in archive.getnames()
        log = archive.extractfile("log.txt")
        assert log is not None
        content = log.read()
    assert len(content) == 100
    assert content.endswith(b"the end")
    assert not list(run.glob("*.tmp"))


def test_packing_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "benchmark.json").write_text("{")  # a step was killed as it wrote
    assert pack(tmp_path) == []
    with pytest.raises(FormatError, match=r"machine\.json is missing"):
        load(tmp_path)


def test_the_record_of_a_machine(tmp_path: Path) -> None:
    started = datetime(2000, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    steps = [{"name": "a", "status": "ok", "seconds": 1.234567, "said": "x" * 1000}]
    record = machine_record("first", 300, started, steps, ended="2000-01-01T00:05:00+00:00")
    assert set(record) == set(MACHINE)
    assert [record[k] for k in ("started", "ended")] == ["2000-01-01T00:00:00+00:00", "2000-01-01T00:05:00+00:00"]
    assert record["steps"] == [{"name": "a", "status": "ok", "seconds": 1.23, "said": "x" * 400}]
    write_run(tmp_path / "out")
    known = {k: MACHINE[k] for k in ("gpu", "capability", "driver", "cuda", "torch", "triton", "commit")}
    write_machine(tmp_path / "out", record | known)
    assert load(tmp_path / "out").machine == record | known


def _set(**values: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        record = json.loads((run / "machine.json").read_text())
        record.update(values)
        (run / "machine.json").write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))

    return damage


def _step(**values: Any) -> Callable[[Path], None]:
    return _set(steps=[MACHINE["steps"][0] | values])  # type: ignore[index, operator]


def _tuned(**values: Any) -> Callable[[Path], None]:
    return lambda run: (run / "tuned.json").write_text(json.dumps(TUNED | values)) and None


def _text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return damage


def _column(name: str, value: str) -> Callable[[Path], None]:
    """Another value in a column of the last timed row of results.csv."""

    def damage(run: Path) -> None:
        lines = (run / "results.csv").read_text().splitlines()
        at = max(i for i, line in enumerate(lines) if ",softmax," in line and ",ok," in line)
        cells = lines[at].split(",")
        cells[COLUMNS.index(name)] = value
        lines[at] = ",".join(cells)
        (run / "results.csv").write_text("\n".join(lines) + "\n")

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"machine {name} missing": (_set(**{name: ...}), rf"machine\.json: {name}") for name in MACHINE},
    **{f"machine {name} of another type": (_set(**{name: 7.5}), rf"machine\.json: {name}: got")
       for name in MACHINE if name not in ("budget_s",)},
    "machine unknown field": (_set(host="secret"), r"machine\.json: host: unknown"),
    "machine later format": (_set(format=2), r"machine\.json: format: got '2'"),
    "machine no GPU": (_set(gpu=""), r"machine\.json: gpu"),
    "machine GPU of no letters": (_set(gpu="NVIDIA"), r"machine\.json: gpu"),
    "machine GPU with markup": (_set(gpu="H100 <!-- /figures -->"), r"machine\.json: gpu"),
    "machine version with a path": (_set(triton="3/../../../x"), r"machine\.json: triton"),
    "machine negative budget": (_set(budget_s=-1), r"machine\.json: budget_s"),
    "machine true budget": (_set(budget_s=True), r"machine\.json: budget_s"),
    "machine time without zone": (_set(started="2000-01-01T00:00:00"), r"machine\.json: started"),
    "machine ends before it starts": (_set(ended="1999-01-01T00:00:00+00:00"), r"machine\.json: ended"),
    "machine no object": (lambda run: (run / "machine.json").write_text("[]") and None, r"machine\.json: got"),
    "machine cut short": (lambda run: (run / "machine.json").write_text('{"format"') and None, r"machine\.json: no JSON"),
    "machine NaN": (_text("machine.json", "300.0", "NaN"), r"machine\.json: no JSON: NaN"),
    "machine no text": (lambda run: (run / "machine.json").write_bytes(b"\xff\xfe") and None, r"machine\.json: no UTF-8"),
    "step status": (_step(status="fine"), r"steps\[0\]: status: got 'fine', allowed: ok"),
    "step name": (_step(name="a b"), r"steps\[0\]: name"),
    "step seconds": (_step(seconds="1"), r"steps\[0\]: seconds"),
    "step said": (_step(said=None), r"steps\[0\]: said"),
    "step unknown field": (_step(more=1), r"steps\[0\]: got"),
    "results unknown column": (_text("results.csv", "clock_sm_mhz", "clock_of_the_sm"), r"results\.csv: column: got 'clock_of_the_sm'"),
    "results column missing": (_text("results.csv", "p50_us", "p20_us"), r"results\.csv: columns: .* allowed: p50_us among them"),
    "results column twice": (_text("results.csv", "clock_mem_mhz", "clock_sm_mhz"), r"results\.csv: columns: .* each once"),
    "results empty": (lambda run: (run / "results.csv").write_text("") and None, r"results\.csv: columns"),
    "results a field too many": (_column("error", "0.1,0.1"), r"results\.csv: line \d+: got .* allowed: \d+ fields"),
    "results of another GPU": (_column("gpu", "NVIDIA H200"), r"results\.csv: line \d+: gpu: got 'NVIDIA H200'"),
    "results of another commit": (_column("commit", "def5678"), r"results\.csv: line \d+: commit"),
    "results of another torch": (_column("torch", "2.12.0"), r"results\.csv: line \d+: torch"),
    "results of no GPU": (_column("gpu", ""), r"results\.csv: line \d+: gpu"),
    "results status": (_column("status", "great"), r"line \d+: status: got 'great'"),
    "results role": (_column("role", "theirs"), r"line \d+: role"),
    "results time": (_column("time", "yesterday"), r"line \d+: time"),
    "results no op": (_column("op", ""), r"line \d+: op"),
    "results op with markup": (_column("op", "<b>"), r"line \d+: op"),
    "results provider": (_column("provider", "a|b"), r"line \d+: provider"),
    "results shape": (_column("shape", "many"), r"line \d+: shape"),
    "results no time": (_column("p50_us", ""), r"line \d+: p50_us"),
    "results time is a word": (_column("p50_us", "fast"), r"line \d+: p50_us"),
    "results time of nothing": (_column("p20_us", "0"), r"line \d+: p20_us: got '0', allowed: a number above 0"),
    "results endless time": (_column("p80_us", "inf"), r"line \d+: p80_us"),
    "results quantiles in disorder": (_column("p20_us", "1e9"), r"line \d+: p50_us: .* between p20_us and p80_us"),
    "results bytes": (_column("bytes", "1.5"), r"line \d+: bytes: got '1.5', allowed: a whole number"),
    "results error": (_column("error", "-1"), r"line \d+: error"),
    "correctness outcome": (_text("correctness.csv", "passed", "well"), r"correctness\.csv: line 2: outcome: got 'well'"),
    "correctness column": (_text("correctness.csv", "worker", "who"), r"correctness\.csv: column: got 'who'"),
    "correctness no test": (_text("correctness.csv", "tests/gpu/a.py::test_a[1]", ""), r"correctness\.csv: line 2: test"),
    "correctness seconds": (_text("correctness.csv", "0.5", "long"), r"correctness\.csv: line 2: seconds"),
    "benchmark no list": (_text("benchmark.json", "benchmarks", "other"), r"benchmark\.json: benchmarks"),
    "benchmark with the host": (_text("benchmark.json", '"node": ""', '"node": "me"'), r"benchmark\.json: machine_info: node"),
    "tuned for another GPU": (_tuned(gpu="NVIDIA H200"), r"tuned\.json: gpu: got 'NVIDIA H200'"),
    "tuned for another Triton": (_tuned(triton="3.7.0"), r"tuned\.json: triton"),
    "tuned source": (_tuned(entries=[ENTRY | {"source": "../x"}]), r"tuned\.json: entries"),
    "tuned unknown field": (_tuned(more=1), r"tuned\.json: entries: not a table"),
    "tuned entry": (_tuned(entries=[ENTRY | {"kernel": 1}]), r"tuned\.json: entries"),
    "tuned config": (_tuned(entries=[ENTRY | {"config": CONFIG | {"num_warps": 3}}]), r"tuned\.json: entries: num_warps"),
    "tuned cluster": (_tuned(entries=[ENTRY | {"config": CONFIG | {"num_ctas": 8}}]), r"tuned\.json: entries: num_ctas"),
    "summary no text": (lambda run: (run / "summary.md").write_bytes(b"\xff") and None, r"summary\.md: no UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_file_and_field(run: Path, kind: str) -> None:
    """In the folder, and once it is packed."""
    damage, message = DAMAGE[kind]
    damage(run)
    with pytest.raises(FormatError, match=message):
        load(run)
    _pack_as_it_is(run)
    with pytest.raises(FormatError, match=message):
        load(run / ARCHIVE)


def _pack_as_it_is(run: Path) -> None:
    with tarfile.open(run / ARCHIVE, "w:gz") as archive:
        for name in FILES:
            archive.add(run / name, name)


def test_a_row_cut_short_at_the_end_is_dropped(run: Path) -> None:
    whole = len(load(run).rows)
    with (run / "results.csv").open("a") as file:
        file.write("2000-01-01T00:00:00+00:00,NVIDIA H1")
    assert len(load(run).rows) == whole


def test_what_programs_said_is_made_printable(run: Path) -> None:
    _column("reason", "\x1b[31mred\x07")(run)
    _step(said="\x1b[31mred")(run)
    results = load(run)
    assert "?[31mred?" in {row["reason"] for row in results.rows}
    assert results.machine["steps"][0]["said"] == "?[31mred"


def _archive(run: Path, *members: tuple[str, bytes | None, str]) -> Path:
    """An archive of (name, content, link target) members."""
    path = run / "made.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content, link in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, link
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content or b""))
    return path


@pytest.mark.parametrize(
    "name", ["../machine.json", "/etc/machine.json", "a/machine.json", "./machine.json", "evil.py", "results.tar.gz"]
)
def test_members_of_other_names_are_refused(run: Path, name: str) -> None:
    path = _archive(run, ("machine.json", b"{}", ""), (name, b"x", ""))
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(FormatError, match=r"member '.*', allowed: machine\.json"):
        load(path)
    assert sorted(run.parent.rglob("*")) == before


def test_links_doubles_bombs_and_other_files_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match=r"machine\.json: no regular file"):
        load(_archive(run, ("machine.json", None, "/etc/passwd")))
    with pytest.raises(FormatError, match="there twice"):
        load(_archive(run, ("machine.json", b"{}", ""), ("machine.json", b"{}", "")))
    with pytest.raises(FormatError, match=r"neither results\.csv nor correctness\.csv"):
        load(_archive(run, ("machine.json", b"{}", "")))
    with pytest.raises(FormatError, match=r"machine\.json is missing"):
        load(_archive(run, ("log.txt", b"", "")))
    (run / "plain.tar.gz").write_bytes(b"no gzip")
    with pytest.raises(FormatError, match="no whole gzip file"):
        load(run / "plain.tar.gz")
    (run / "cut.tar.gz").write_bytes((run / ARCHIVE).read_bytes()[:-200])
    with pytest.raises(FormatError, match="no whole gzip file"):
        load(run / "cut.tar.gz")
    (run / "no.tar.gz").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(FormatError, match="no tar archive"):
        load(run / "no.tar.gz")
    with pytest.raises(FormatError, match="no such file or folder"):
        load(run / "nothing")
    monkeypatch.setattr(results_load, "MAX_BYTES", 10)
    with pytest.raises(FormatError, match=r"\d+ bytes, allowed: 10"):
        load(run)
    with pytest.raises(FormatError, match=r"member machine\.json: \d+ bytes, allowed: 10"):
        load(run / ARCHIVE)
    monkeypatch.setattr(results_load, "MAX_ARCHIVE", 100)
    with pytest.raises(FormatError, match="more than 100 bytes unpacked"):
        load(run / ARCHIVE)


def test_a_link_in_the_folder_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (run / "machine.json").unlink()
    (run / "machine.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="no regular file"):
        load(run)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (H100, "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-80gb-hbm3-mig-1g-10gb"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"), ("../../x", "x"), ("", "cpu"),
    ],
)  # fmt: skip
def test_cards_that_differ_have_folders_that_differ(name: str, folder: str) -> None:
    assert gpu_folder(name) == folder
