"""The matrix from end to end, with made-up providers: each ends as a row of the right status, and none stops the others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from bench.environment import alone
from bench.record import read
from tests.bench.sessions import command

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path) -> None:
    """The matrix, and then, in the same process, all over again with --bench-resume."""
    matrix = ["-p", "tests.bench.fake_gpu", "bench/test_3_matrix.py", f"--bench-csv={folder / 'r.csv'}"]
    sessions = command([*matrix, f"--benchmark-json={folder / 'r.json'}"], [*matrix, "--bench-resume"])
    done = subprocess.run(sessions, capture_output=True, text=True, check=False, cwd=ROOT, env=alone())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_every_provider_becomes_a_row(tmp_path: Path) -> None:
    run(tmp_path)
    everything = read(tmp_path / "r.csv")
    benchmarks = json.loads((tmp_path / "r.json").read_text())["benchmarks"]
    assert len(everything) == 1 + 3 * 6 + 1 + 3
    rows, again = everything[: 1 + 3 * 6], everything[1 + 3 * 6 :]
    by = {(r["provider"], r["pass"]): r for r in rows}
    assert by["away", ""]["reason"] == "away is not installed"
    for pass_ in ("fwd", "bwd", "fwd+bwd"):
        assert by["wrong", pass_]["status"] == "wrong"
        assert by["wrong", pass_]["p50_us"] == ""
        assert by["broken", pass_]["reason"] == "ValueError: it broke"
        assert by["refuses", pass_]["status"] == "unsupported"
        for name in ("right", "waits", "ours"):
            row = by[name, pass_]
            assert row["status"] == "ok"
            assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
            assert float(row["gbps"]) > 0
        assert by["ours", pass_]["best_peer"] in ("right", "waits")  # never the wrong one, however fast
        assert float(by["ours", pass_]["ratio_to_best_peer"]) > 0
    for name in ("right", "waits", "ours"):
        assert (by[name, "bwd"]["method"], by[name, "bwd"]["configuration"]) == ("graph", "")  # the first of the process too
    assert by["right", "fwd"]["method"] == by["ours", "fwd"]["method"] == "graph"  # after the one that could not be captured
    assert by["waits", "fwd"]["method"] == "events"
    assert "no CUDA graph: RuntimeError: CUDA error: operation not permitted" in by["waits", "fwd"]["configuration"]
    assert by["ours", "fwd"]["best_peer"] == "right"
    assert by["ours", "fwd"]["reason"] == "timed by graph, so no ratio to waits (events)"
    assert by["right", "fwd"]["peak_bytes"] == "4096"
    assert by["right", "fwd+bwd"]["method"] == "loop"
    assert len(benchmarks) == 3 * 3  # what was timed, and nothing else
    for benchmark in benchmarks:
        row = by[benchmark["extra_info"]["provider"], benchmark["extra_info"]["pass"]]
        assert abs(benchmark["stats"]["median"] * 1e6 / float(row["p50_us"]) - 1) < 1e-2
    assert {(r["provider"], r["status"]) for r in again} == {("away", "absent"), ("broken", "error")}
