"""Both calls of bench/gpu.sh from end to end on the fake CUDA layer, and one that is stopped in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench.environment import alone
from bench.plans import PLANS
from bench.record import read
from bench.results_format import FormatError, Results, pack
from bench.results_load import load

ROOT = Path(__file__).resolve().parents[2]
FAKE = [sys.executable, "-m", "tests.bench.fake_cuda", "bench.gpu"]
ROWS = "softmax-4k-bf16|layer_norm-16384x768-bf16-bwd"
MEASURING = {
    call: ",".join(s.name for s in PLANS[call].steps if s.measures and s.name != "models") for call in ("first", "second")
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the fake layer"),
]


def environment() -> dict[str, str]:
    return {**alone(), "PYTEST_PLUGINS": "tests.bench.fake_cuda", "PYTHONPATH": str(ROOT), "FUSED_OPS_COMMIT": "0" * 12}


def loaded(out: Path) -> Results:
    """The results, once their driver is one: what the fake layer measured is not taken as it is."""
    with pytest.raises(FormatError, match="SYNTHETIC"):
        load(out)
    for name in ("machine.json", "results.csv"):
        (out / name).write_text((out / name).read_text().replace("SYNTHETIC: no GPU", "580.1"))
    pack(out)
    return load(out)


@pytest.mark.parametrize("call", MEASURING)
def test_a_call_from_end_to_end(call: str, tmp_path: Path) -> None:
    """The steps that measure: what other steps start is no pytest, which the fake layer does not reach."""
    command = [*FAKE, str(tmp_path), "--call", call, "--seconds", "4000", "--steps", MEASURING[call], "--only", ROWS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stdout[-3000:] + (tmp_path / "log.txt").read_text()[-3000:]
    results = loaded(tmp_path)
    assert [(s["name"], s["status"]) for s in results.machine["steps"]] == [(n, "ok") for n in MEASURING[call].split(",")]
    assert load(tmp_path / "results.tar.gz").rows == results.rows
    rows = [r for r in results.rows if r["kind"] == "kernel" and r["status"] == "ok"]
    assert {(r["op"], r["pass"]) for r in rows} == {("softmax", "fwd"), ("softmax", "bwd"), ("layer_norm", "bwd")}
    assert {r["provider"] for r in rows} >= {"eager", "ours"} | ({"torchscript"} if call == "second" else set())
    assert ("compile" in {r["provider"] for r in results.rows}) is (call == "second"), "compiled on the CPU: it may have failed"
    assert {r["method"] for r in rows} == {"graph"}, "the first backward of a process too"
    assert all(r["ratio_to_best_peer"] and r["percent_of_limit"] for r in rows if r["provider"] == "ours")
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_call_that_is_stopped_keeps_what_it_measured(tmp_path: Path) -> None:
    command = [*FAKE, str(tmp_path), "--seconds", "4000", "--steps", "headline"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    results = tmp_path / "results.csv"
    try:
        while process.poll() is None and not (results.exists() and results.read_text().count(",ok,") >= 5):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert sum(r["status"] == "ok" for r in read(results)) >= 5
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        packed = archive.extractfile("results.csv")
        assert packed is not None
        assert packed.read().count(b",ok,") >= 5
    (step,) = loaded(tmp_path).machine["steps"]
    assert (step["name"], step["status"], step["said"]) == ("headline", "cut", "stopped by a signal")
