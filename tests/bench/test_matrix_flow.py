"""The matrix from end to end, with made-up providers: each ends as a row of the right status, and none stops the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.environment import alone
from bench.record import read

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.bench.fake_gpu", "bench/test_3_matrix.py", "-q", f"--bench-csv={folder / 'r.csv'}",
         f"--benchmark-json={folder / 'r.json'}", *options], capture_output=True, text=True, check=False, cwd=ROOT, env=alone(),
    )  # fmt: skip


def test_every_provider_becomes_a_row(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = read(tmp_path / "r.csv")
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
    assert len(rows) == 1 + 3 * 6
    benchmarks = json.loads((tmp_path / "r.json").read_text())["benchmarks"]
    assert len(benchmarks) == 3 * 3  # what was timed, and nothing else
    for benchmark in benchmarks:
        row = by[benchmark["extra_info"]["provider"], benchmark["extra_info"]["pass"]]
        assert abs(benchmark["stats"]["median"] * 1e6 / float(row["p50_us"]) - 1) < 1e-2

    done = run(tmp_path, "--bench-resume")
    assert done.returncode == 0, done.stdout[-3000:]
    again = read(tmp_path / "r.csv")[len(rows) :]
    assert {(r["provider"], r["status"]) for r in again} == {("away", "absent"), ("broken", "error")}
