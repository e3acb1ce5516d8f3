"""Precompiling: the process that launches finds every kernel in the cache, and what fails or dies stops nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import headline, precompile
from fused_ops._runtime.launch_path import triton_version
from fused_ops._tools import launches as launches_module
from fused_ops._tools import precompile as core
from fused_ops._tools import tune_measure
from fused_ops._tools.launches import Gpu, Launch, Pointer, listed, unique
from fused_ops._tools.precompile import Call
from fused_ops._tools.workers import in_processes
from fused_ops.kernels.config import CLUSTER_TRITON
from tests import process
from tests.bench.precompiled import FIRST

ROOT = Path(__file__).parents[2]
H100 = Gpu("NVIDIA Test 80GB", (9, 0), 132)


SHARED = pytest.mark.xdist_group("bench-precompiled")  # one process makes what several tests look at
WHY_NO_STUB = "the stub driver needs Linux and a C compiler, as Triton itself does"
NO_STUB = sys.platform != "linux" or shutil.which(os.environ.get("CC", "cc")) is None


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stub driver, where it can be built, and of the cache beside it."""
    folder = tmp_path_factory.mktemp("stub")
    if not NO_STUB:
        subprocess.run([sys.executable, "-m", "tests.runtime.stub_driver", "build", str(folder)], check=True, cwd=ROOT)
    return folder


def _program(stub: Path, cache: Path, *words: str) -> dict[str, Any]:
    """Word -> what tests.bench.precompiled says to it, all of them in one process."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_OPS_BACKEND")}
    environment |= {"TRITON_LIBCUDA_PATH": str(stub), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "FUSED_OPS_CACHE": str(stub / "tables")}
    library = None if NO_STUB else stub / "libcuda.so.1"
    done = process.output(process.module("tests.bench.precompiled", *words, library=library), env=environment)
    return dict(zip(words, map(json.loads, done.splitlines()), strict=True))


@pytest.fixture(scope="module")
def programs(stub: Path) -> dict[str, Any]:
    """What two programs say, the second after the first: a few calls precompiled and made, and keys in every order."""
    orders = (("sorted", "0123", "1302"), ("reversed", "3210"))
    words = ((), ()) if NO_STUB else (("few-compile",), ("few-run",))
    cache = stub / "cache"
    return {**_program(stub, cache, *orders[0], *words[0]), **_program(stub, cache, *orders[1], *words[1])}


def _all_found(compiled: dict[str, Any], ran: dict[str, Any], least: int) -> None:
    assert (compiled["failed"], compiled["unlisted"], compiled["there"], compiled["left"]) == ([], [], 0, 0)
    assert compiled["launcher"] == ""
    assert ran == {"hits": compiled["compiled"], "misses": 0, "new": []}
    assert ran["hits"] >= least


@SHARED
@pytest.mark.skipif(NO_STUB, reason=WHY_NO_STUB)
def test_a_run_after_precompiling_finds_everything_in_the_cache(programs: dict[str, Any]) -> None:
    """Kernels and launchers: not one entry is new. The runs are real calls through Triton's own driver and launchers."""
    _all_found(programs["few-compile"], programs["few-run"], 7)


@pytest.mark.slow
@pytest.mark.skipif(NO_STUB, reason=WHY_NO_STUB)
def test_a_run_of_more_calls_finds_everything_too(stub: Path, tmp_path: Path) -> None:
    """With the statistics of layer norm, and K in parts."""
    compiled = _program(stub, tmp_path, "compile")["compile"]
    _all_found(compiled, _program(stub, tmp_path, "run")["run"], 14)


@SHARED
def test_the_key_of_a_kernel_is_the_same_in_every_order(programs: dict[str, Any]) -> None:
    """Triton 3.6 and 3.7 mix into a kernel's key what its functions use, if another kernel has called them before."""
    first = programs["sorted"]
    assert len(first) > 20
    for order in ("reversed", "0123", "3210", "1302"):
        assert programs[order] == first, order
    assert len({first[name] for name in FIRST}) == 4


def test_every_headline_row_is_listed_with_its_real_configuration() -> None:
    calls = precompile.calls_of("headline")
    assert len(calls) == len(headline.headline_tasks())
    found = core.launches_of(calls, H100)
    assert {error for _, error in found} == {""}
    kernels = {launch.kernel for launches, _ in found for launch in launches}
    clusters = triton_version()[1] >= CLUSTER_TRITON
    assert {
        f"softmax_bwd_{'packed' if clusters else 'chunked'}_kernel", "softmax_fwd_packed_kernel", "layer_norm_bwd_kernel",
        f"layer_norm_fwd_{'cluster' if clusters else 'chunked'}_kernel", "linear_fwd_tma_kernel",
        "linear_split_k_kernel", "gated_linear_fwd_tma_kernel", "product_sum_tma_kernel", "linear_dact_tma_kernel",
        "column_sum_kernel",
    } <= kernels  # fmt: skip


def test_the_headline_rows_are_those_that_are_tuned_first() -> None:
    tuned = [task for task in headline.headline_tasks() if task.spec.tuned is not None]
    shapes = [(task.spec.name, 1 << (task.case.shape[0] - 1).bit_length(), task.case.shape[1]) for task in tuned]
    assert list(dict.fromkeys(shapes)) == tune_measure.headline_shapes()
    assert len(shapes) > 20


def test_samples_and_row_lengths_are_listed(pytestconfig: pytest.Config) -> None:
    pytestconfig.addinivalue_line("markers", "memory(bytes): of tests/gpu")
    calls = [
        call for call in precompile.calls_of("correctness") if call.name.startswith("layer_norm") and "bfloat16" in call.name
    ]
    assert len(calls) > 20
    found = core.launches_of([calls[0], calls[1], *calls[-2:]], H100)
    assert {error for _, error in found} == {""}
    assert any(not arg.aligned for launches, _ in found for one in launches for arg in one.args if isinstance(arg, Pointer))


def test_calls_launch_nothing_and_leave_no_trace() -> None:
    from fused_ops import fused_softmax
    from fused_ops._runtime import launch, tables
    from fused_ops._torch import eager

    before = (launch._recorder, eager._modes, eager._ORDINARY_TYPES, dict(tables._tables))
    with listed(H100) as launches:
        x = torch.empty(1 << 20, 1 << 20, device="cuda", dtype=torch.bfloat16)  # 2 TiB
        fused_softmax(x[:, :4096], -1)
        with pytest.raises(IndexError):
            fused_softmax(x, 7)
    assert [one.kernel for one in launches] == ["softmax_fwd_kernel"]
    assert (launch._recorder, eager._modes, eager._ORDINARY_TYPES, dict(tables._tables)) == before
    x = torch.ones(2, 4)
    assert (x.is_cuda, x.is_cpu, x.get_device()) == (False, True, -1)
    assert not any(name in vars(launches_module.FakeTensor) for name in ("is_cuda", "is_cpu", "get_device"))


def _column_sum(P: Any, aligned: bool = True, **options: Any) -> Launch:
    part, out = Pointer(torch.float32, aligned), Pointer(torch.bfloat16)
    named = {"stride_pp": 64, "BLOCK_P": 64, "BLOCK_N": 32, **options}
    return Launch("fused_ops.kernels.reduce", "column_sum_kernel", 2, (part, part, out, out, P, 64), tuple(named.items()))


def test_one_launch_stands_for_all_that_run_one_compiled_kernel() -> None:
    same = [_column_sum(32), _column_sum(64), _column_sum(64, stride_pp=128)]
    assert len(unique(same)) == 1
    others = [_column_sum(1), _column_sum(5), _column_sum(2**31), _column_sum(32, aligned=False), _column_sum(32, BLOCK_N=64)]
    assert len(unique([*same, *others, _column_sum(7)])) == 1 + len(others)


def test_a_kernel_that_fails_or_kills_its_process_is_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    three = [_column_sum(1), _column_sum(5), _column_sum(32)]
    monkeypatch.setattr(core, "_list", lambda *_: list(three))

    def compile_one(launch: Launch, *_: Any) -> bool:
        if launch.args[4] == 1:
            os._exit(134)
        if launch.args[4] == 5:
            raise ValueError("no such layout")
        return False

    monkeypatch.setattr(core, "_compile", compile_one)
    outcome = core.precompile([], H100, processes=2)
    assert (outcome.compiled, outcome.left) == (1, 0)
    assert sorted(why for _, why in outcome.failed) == ["ValueError: no such layout", "its process ended with 134"]
    assert "2 failed (column_sum_kernel: " in str(outcome)


def test_a_call_that_cannot_be_listed_is_counted_and_the_others_are_listed() -> None:
    def fails() -> None:
        torch.ones(2, device="cuda").sum().item()

    def softmax() -> None:
        from fused_ops import fused_softmax

        fused_softmax(torch.empty(4, 64, device="cuda"), -1)

    (_, error), (launches, fine) = core.launches_of([Call("item", fails), Call("softmax", softmax)], H100)
    assert error
    assert (len(launches), fine) == (1, "")


def test_processes_give_every_outcome_once_whatever_dies() -> None:
    def work(item: int) -> int:
        if item % 7 == 3:
            os._exit(9)
        if item % 7 == 5:
            raise KeyError(item)
        return item * item

    outcomes = {done.item: done for done in in_processes(work, range(40), 3)}
    assert sorted(outcomes) == list(range(40))
    assert all(outcomes[i].result == i * i for i in range(40) if i % 7 not in (3, 5))
    assert {outcomes[i].error for i in range(40) if i % 7 == 3} == {"its process ended with 9"}
    assert all(outcomes[i].error.startswith("KeyError") for i in range(40) if i % 7 == 5)


def test_after_the_deadline_the_processes_are_gone() -> None:
    before = set(multiprocessing.active_children())
    assert list(in_processes(lambda _: threading.Event().wait(), range(8), 2, deadline=0.0)) == []
    assert set(multiprocessing.active_children()) <= before


def test_what_the_time_does_not_suffice_for_is_counted() -> None:
    outcome = core.precompile(precompile.calls_of("headline")[:3], H100, processes=2, seconds=1e-9)
    assert (outcome.compiled, outcome.there, outcome.failed) == (0, 0, [])
    assert [why for _, why in outcome.unlisted] == ["no time"] * 3
    assert "0 kernels (0 already there), 0 failed, 3 calls not listed (softmax-4k-bf16-fwd-kernel: no time; " in str(outcome)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rows", "models"], "argument --rows: got 'models'"), (["--processes", "0"], "argument --processes: got 0"),
        (["--seconds", "-1"], "argument --seconds: got -1.0"), (["--gpu", "H100"], "argument --gpu: got 'H100'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        precompile.main(options)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
