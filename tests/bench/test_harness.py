"""The suite under pytest-benchmark, the providers on a CPU, and bench/gpu.sh as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.__main__ import main
from bench.environment import alone
from bench.gpu import arguments, execute, merge_json
from bench.gpu import main as gpu_main
from bench.headline import SWEEPS
from bench.measure import Bundle, Measurement
from bench.plans import PLANS
from bench.provider import missing
from bench.providers import PROVIDERS, Unsupported, Workload, by_name
from bench.record import read
from fused_ops import REGISTRY
from tests.bench.sessions import command as sessions_command
from tests.bench.small import task

MLP_ONLY = ("checkpoint", "ours+recompute")
ROOT = Path(__file__).resolve().parents[2]
SHARED = pytest.mark.xdist_group("bench-harness")  # one process makes what several tests look at
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def command(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**alone(), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(args, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


IN_PARALLEL = {"PYTEST_XDIST_WORKER": "gw0", "PYTEST_XDIST_WORKER_COUNT": "2", "PYTEST_ADDOPTS": "-n 2"}
"""The environment of a worker of pytest-xdist, and of a user whose tests always run in parallel."""


def _imposed() -> list[str]:
    return [name for name in os.environ if name.startswith("PYTEST_XDIST_") or name == "PYTEST_ADDOPTS"]


def test_run_measures_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark would measure nothing under pytest-xdist, and write no JSON."""
    for name, value in IN_PARALLEL.items():
        monkeypatch.setenv(name, value)
    assert len(_imposed()) >= 3
    seen: list[list[str]] = []
    monkeypatch.setattr(pytest, "main", lambda _: seen.append(_imposed()) or 0)
    assert main(["run", "--out", str(tmp_path)]) == 0
    assert seen == [[]]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what a step of bench/gpu.sh left: one session of `pytest bench`, and one whose budget is spent."""
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IN_PARALLEL.items():
            patch.setenv(name, value)
        measured = [
            "-k",
            "test_host and softmax-no_grad",
            f"--benchmark-json={folder / 'run.json'}",
            f"--bench-csv={folder / 'run.csv'}",
        ]
        spent = ["--bench-budget=0", f"--bench-csv={folder / 'spent.csv'}"]
        sessions = sessions_command(["bench/test_2_host.py", *measured], ["bench/test_2_host.py", *spent])
        status, _ = execute(sessions, 600.0, folder / "log.txt", "host", alone())
    assert status == 0, (folder / "log.txt").read_text()
    return folder


@SHARED
def test_pytest_benchmark_is_the_harness(step: Path) -> None:
    """`pytest bench` measures although the project's default is --benchmark-disable; JSON and CSV agree; compare reads it.

    In one process, where pytest-xdist is imposed from outside.
    """
    benchmarks = json.loads((step / "run.json").read_text())["benchmarks"]
    rows = read(step / "run.csv")
    assert [r["provider"] for r in rows] == ["eager", "autograd.Function", "custom_op", "ours"]
    assert len(benchmarks) == len(rows)
    for benchmark, row in zip(benchmarks, rows):
        assert benchmark["stats"]["median"] * 1e6 == pytest.approx(float(row["p50_us"]), rel=1e-2)
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
    compared = command(sys.executable, "-m", "pytest_benchmark", "compare", str(step / "run.json"), cwd=step)
    assert compared.returncode == 0, compared.stderr
    assert "test_host[softmax-no_grad-ours]" in compared.stdout


@SHARED
def test_a_spent_budget_starts_nothing(step: Path) -> None:
    assert "the time budget is spent" in (step / "log.txt").read_text()
    assert not (step / "spent.csv").exists()


OPS = ("softmax", "layer_norm", "linear")
ON_EACH_OP = [(p.name, OPS) for p in PROVIDERS if p.name not in ("compile", "onnxruntime", *MLP_ONLY)]
EXPORTED = [("onnxruntime", ("linear",)), pytest.param("onnxruntime", OPS, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("name", "ops"), [*ON_EACH_OP, *EXPORTED], ids=lambda value: value if isinstance(value, str) else len(value)
)
def test_provider_runs_or_says_why_not(name: str, ops: tuple[str, ...]) -> None:
    """On a CPU: an absent provider has a reason; an available one is right on each op. (compile takes half a minute.)"""
    provider = by_name(name)
    reason = provider.available("cpu")
    verdicts = {} if reason else {op: Measurement(provider, Bundle.of(task(op), "cpu")).verdict for op in ops}
    assert len(reason) > 10 or verdicts.keys() == set(ops)
    assert not {op: verdict.reason() for op, verdict in verdicts.items() if not verdict.right}


@pytest.mark.parametrize("name", MLP_ONLY)
def test_an_mlp_trains_with_less_memory_by_either_way(name: str) -> None:
    """Both are right on forward and backward, whose peak memory a GPU row has, and refuse the rest."""
    assert Measurement(by_name(name), Bundle.of(task("mlp", "fwd+bwd"), "cpu")).verdict.right
    assert _kept(name) < _kept("ours")
    for op, pass_ in (("linear", "fwd+bwd"), ("mlp", "fwd")):
        with pytest.raises(Unsupported, match=r"MLP|fused_mlp"):
            by_name(name).prepare(_workload(op, pass_))


def _kept(name: str) -> int:
    """How many tensors the provider's forward of an MLP keeps for the backward, its arguments apart."""
    arguments = Bundle.of(task("mlp", "fwd+bwd"), "cpu").sets[0].args
    given = {a.data_ptr() for a in arguments if isinstance(a, Tensor)}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        by_name(name).prepare(_workload("mlp", "fwd+bwd")).call(*arguments)
    return len({t.data_ptr() for t in kept} - given)


def _workload(op: str, pass_: str) -> Workload:
    return Workload(REGISTRY[op], task(op).case, pass_, (), {}, "cpu")


@pytest.mark.parametrize("name", ["torchscript", "onnxruntime"])
def test_provider_refuses_what_it_cannot_do(name: str) -> None:
    with pytest.raises(Unsupported, match="inference only"):
        Measurement(by_name(name), Bundle.of(task("layer_norm", "bwd"), "cpu"))
    with pytest.raises(Unsupported, match=r"no torch\.nn module is one gated_linear"):
        by_name(name).prepare(Workload(REGISTRY["gated_linear"], task("linear").case, "fwd", (), {}, "cpu"))


def test_fp8_is_checked_and_refused_like_any_op() -> None:
    bundle = Bundle.of(task("linear_fp8"), "cpu")
    for name in ("eager", "ours"):
        verdict = Measurement(by_name(name), bundle).verdict
        assert verdict.right, f"{name}: {verdict.reason()}"
    x, w, x_scale, w_scale, bias, activation = bundle.sets[0].args
    unscaled = bundle.task.spec.public(x, w, x_scale.new_ones(()), w_scale, bias, activation)
    assert not bundle.check([unscaled], 0).right
    for name in ("torchscript", "onnxruntime", "cublaslt"):
        with pytest.raises(Unsupported):
            Measurement(by_name(name), bundle)
    with pytest.raises(Unsupported, match="fp8 products only"):
        Measurement(by_name("scaled_mm"), Bundle.of(task("linear"), "cpu"))


def test_an_fp8_output_may_differ_by_one_step_and_no_more() -> None:
    bundle = Bundle.of(task("layer_norm_fp8", dtype=torch.bfloat16), "cpu")
    for name in ("eager", "ours"):
        verdict = Measurement(by_name(name), bundle).verdict
        assert verdict.right, f"{name}: {verdict.reason()}"
    q, scale = bundle.task.spec.public(*bundle.sets[0].args)
    codes = q.view(torch.uint8)
    near, far = codes.clone(), codes.clone()
    near[0, 0] ^= 1  # a neighbour, or the next but one
    far[0, codes[0].argmin()] = 126  # 448 where something near 0 belongs
    assert bundle.check([near.view(q.dtype), scale], 0).right
    assert not bundle.check([far.view(q.dtype), scale], 0).right
    assert not bundle.check([q, scale * 1.2], 0).right


def test_torchscript_says_whether_it_fused() -> None:
    prepared = Measurement(by_name("torchscript"), Bundle.of(task("linear"), "cpu")).prepared
    assert "TensorExprGroup" in prepared.configuration


def test_a_missing_module_is_named() -> None:
    assert missing("no_such_module_here") == "no_such_module_here is not installed"


@pytest.fixture
def _sigterm() -> Iterator[None]:
    """What SIGTERM does is what it did before, though bench.gpu has run in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _steps(said: str) -> list[str]:
    return [line.split()[4] for line in said.splitlines() if line[:7].strip().isdigit()]


@ON_CPU
@pytest.mark.usefixtures("_sigterm")
@pytest.mark.parametrize("call", PLANS)
def test_dry_run_says_what_would_run(call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_main([str(tmp_path / "out"), "--call", call, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert _steps(said) == [*(s.name for s in PLANS[call].steps), "close"]
    assert not (tmp_path / "out").exists()
    for step in PLANS[call].steps:
        for word in step.command:
            if word.startswith("--bench-sweep="):
                assert f"Sweep {word[-1]}: {SWEEPS[int(word[-1])][0]}" in said
                assert "softmax-4k-bf16-fwd-kernel" in said


def test_gpu_sh_runs_from_any_folder(tmp_path: Path) -> None:
    """A dry run into a folder beside, by steps whose description needs no torch."""
    done = command(str(ROOT / "bench/gpu.sh"), "out", "--steps", "probe,correctness", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _steps(done.stdout) == ["probe", "correctness", "close"]
    assert f"into {tmp_path / 'out'}:" in done.stdout
    assert not (tmp_path / "out").exists()


@ON_CPU
@pytest.mark.usefixtures("_sigterm")
def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_main([str(tmp_path / "out")]) == 2
    assert "no CUDA device: nothing was run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_sh_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    """With the status of a wrong command line."""
    assert command(str(ROOT / "bench/gpu.sh")).returncode == 2
    done = command(str(ROOT / "bench/gpu.sh"), str(tmp_path / "out"), "--call", "third")
    assert done.returncode == 2
    assert "got third" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_only_starts_processes_does_not_import_torch() -> None:
    """It takes seconds, and who mistyped an option need not wait for it."""
    done = command(sys.executable, "-c", "import sys, bench.gpu, bench.correctness; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_a_python_without_torch_is_named_in_one_sentence(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    for python in (bare, tmp_path / "absent"):
        done = subprocess.run(
            [str(ROOT / "bench/gpu.sh"), str(tmp_path / "out")], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHON": str(python)},
        )  # fmt: skip
        assert done.returncode == 2
        (sentence,) = done.stderr.strip().splitlines()
        assert sentence.startswith(f"bench/gpu.sh: {python} must have torch")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad, message in (
        (["--steps", "matrx"], "got matrx, allowed: wheels"),
        (["--call", "third"], "got third, allowed: first"),
        (["--seconds", "0"], "got 0, allowed: more than 0"),
    ):
        with pytest.raises(SystemExit):
            arguments([str(tmp_path), *bad])
        assert message in capsys.readouterr().err


def test_a_step_is_stopped_at_its_limit_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is over as soon as the step has begun. A child that outlives it would say so."""
    pipe, log = tmp_path / "pipe", tmp_path / "log.txt"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = f"import time; pipe = open({str(pipe)!r}, 'w'); print(flush=True); time.sleep(60); pipe.write('alive')"
    script = (
        f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
        "child.stdout.readline(); print('began', flush=True); time.sleep(60)"
    )
    wait = subprocess.Popen.wait

    def over_once_begun(process: Any, timeout: float | None = None) -> int:
        while timeout == 7.0 and process.poll() is None:
            if "began" in log.read_text().splitlines():
                raise subprocess.TimeoutExpired("step", timeout)
        return wait(process, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "wait", over_once_begun)
        assert execute([sys.executable, "-c", script], 7.0, log, "slow", dict(os.environ)) == (124, "began")
    os.set_blocking(reading, True)
    assert os.read(reading, 5) == b"", "a child was left alive"
    os.close(reading)
    assert execute([sys.executable, "-c", "print('one'); print('two')"], 600.0, log, "fast", dict(os.environ)) == (0, "two")
    assert "===== slow" in log.read_text()


def test_json_of_the_steps_is_one_file(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.json").write_text(
            json.dumps({"machine_info": {}, "benchmarks": [{"name": f"b{i}", "stats": {"data": [1.0], "median": 1.0}}]})
        )
    (tmp_path / "cut.json").write_text("")
    merge_json(sorted(tmp_path.glob("*.json")), tmp_path / "all")
    benchmarks = json.loads((tmp_path / "all").read_text())["benchmarks"]
    assert [b["name"] for b in benchmarks] == ["b0", "b1"]
    assert all(b["stats"] == {"median": 1.0} for b in benchmarks), "the samples are not carried along"
