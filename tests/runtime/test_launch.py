"""The direct launch against kernel[grid]: what the driver is asked for is the same, in every situation.

There is no GPU in it: Triton's own driver and launcher run on a libcuda that records (stub_cuda.c), in a process of its
own. FUSED_OPS_TEST_TRITONS, folders joined by ":" that each hold another version's `triton`, repeats it for them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_ops._runtime import compiled, launch
from fused_ops.kernels import rows
from tests import process

ROOT = Path(__file__).parents[2]
TRITONS = ["", *filter(None, os.environ.get("FUSED_OPS_TEST_TRITONS", "").split(":"))]


# The most calls, [in Python, in Python and C]: of a direct launch over an empty function's one, and of fused_layernorm with it.
DIRECT, PUBLIC = [2, 6], [16, 41]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("the stub driver needs Linux and a C compiler, as Triton itself does")
    folder = tmp_path_factory.mktemp("stub")
    program = [sys.executable, "-m", "tests.runtime.stub_driver"]
    subprocess.run([*program, "build", str(folder)], check=True, cwd=ROOT)
    return folder


def _program(stub: Path, triton: str, *command: str, program: str = "stub_driver") -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(stub), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_CACHE_DIR": str(stub / (triton.replace("/", "_") or "here"))}
    environment["PYTHONPATH"] = ":".join(filter(None, [triton, str(ROOT), environment.get("PYTHONPATH", "")]))
    code = process.module(f"tests.runtime.{program}", *command, library=stub / "libcuda.so.1")
    return json.loads(process.output(code, env=environment))


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("triton", TRITONS, ids=lambda path: path or "installed")
def test_direct_launch_is_what_triton_launches(stub: Path, triton: str, few: bool) -> None:
    result = _program(stub, triton, "check", *(["few"] if few else []))
    assert result["compared"] > (60 if few else 250)
    assert result["wrong"] == []
    can, clusters = result["clusters"]
    assert can == (tuple(map(int, result["triton"].split(".")[:2])) >= (3, 8))
    assert len(clusters) == ((6 if few else 36) if can else 0)
    for programs, launched, cluster in clusters:  # a kernel's grid counts clusters, the driver's their programs
        assert (programs, launched) == (3, 3 * cluster)
    assert {cluster for *_, cluster in clusters} == (({2} if few else {2, 4, 8}) if can else set())
    assert result["device"] == [True, True], "another device has a kernel and a stream of its own"
    assert result["threads"] == [[0, 1, 2, 3], 800]
    assert result["hooked"] == 1, "a profiler's hook sees the launch"
    assert result["fallback"] == [1, True], "an unknown launcher is replaced by Triton's, once"
    assert result["specialisations"] <= 4, "what one plan keeps has a limit"


@pytest.mark.parametrize("triton", TRITONS, ids=lambda path: path or "installed")
def test_direct_launch_makes_fewer_calls(stub: Path, triton: str) -> None:
    """Host cost as a count of calls. kernel[grid] makes 40 over the empty function under Triton 3.7, 44 under 3.8, 48 under 3.9."""
    made = _program(stub, triton, "count")
    for call in ("launcher", "public"):
        direct, through, nothing = (made[f"{way} {call}"] for way in ("direct", "kernel[grid]", "without a launch"))
        for a, b, empty, limit in zip(direct, through, nothing, DIRECT):
            assert a - empty <= limit, made
            assert 4 * (a - empty) <= b - empty, made
    assert made["direct public"][0] <= PUBLIC[0], made
    assert made["direct public"][1] <= PUBLIC[1], made


@pytest.mark.parametrize("triton", TRITONS, ids=lambda path: path or "installed")
def test_a_refused_launch_is_named_and_kernels_stay_loaded(stub: Path, triton: str) -> None:
    found = _program(stub, triton, "faults", program="stub_situations")
    launch = "while launching column_sum_kernel[(2,)] on cpu: part_ptr=float32[4, 64]"
    for way in ("first", "direct", "late"):
        assert found[way].startswith("RuntimeError: Triton Error [CUDA]: "), found
        assert found[way].count(launch) == 1, found
        for value in ("P=4", "N=64", "stride_pp=64", "BLOCK_P=64", "BLOCK_N=32"):
            assert value in found[way].split()
        assert ("CUDA_LAUNCH_BLOCKING=1" in found[way]) == (way == "late")
    assert found["after"] == ["", 1], "a refused launch spoils nothing"
    unloads = tuple(map(int, found["triton"].split(".")[:2])) >= (3, 8)
    assert found["cleared"] == ["", 1, 0, 0], "with Triton's caches cleared, a plan launches its own kernel, still loaded"
    assert found["let go"] == (1 if unloads else 0), "Triton unloads a kernel that no plan holds"
    assert found["again"] == ["", 1]


@pytest.mark.parametrize("triton", TRITONS, ids=lambda path: path or "installed")
def test_scratch_lives_as_long_as_a_launch(stub: Path, triton: str) -> None:
    """Kernels with descriptors, forward and backward: each launch is given one buffer of its size, and none is kept."""
    found = _program(stub, triton, "scratch", program="stub_situations")
    for use in ("fwd", "dact"):
        assert found[use] == [1, [[1, True, True, 0]] * 3], found  # the first of three launches by kernel[grid]


def test_nothing_is_launched_on_an_empty_grid() -> None:
    for device in (-1, 0):
        launch.launch(compiled.Planned(device, None, {}), 0, torch.empty(0))


def test_the_grid_of_a_plan() -> None:
    """Rows a program, rows apart, tiles of columns beside each other, and a persistent grid's end."""
    for M in (0, 1, 7, 8, 9, 64, 1000):
        assert compiled.Planned(0, None, {}, block=8).grid(M) == -(-M // 8)
        assert compiled.Planned(0, None, {}, block=8, across=3).grid(M) == -(-M // 8) * 3
        assert compiled.Planned(0, None, {}, block=8, across=3, most=5).grid(M) == min(5, -(-M // 8) * 3)
        assert compiled.Planned(0, None, {}, block=4, step=8).grid(M) == rows.row_tiles(M, 4, 8)


def test_an_unknown_launcher_is_left_to_triton() -> None:
    class Compiled:
        _run = object()

    assert compiled._direct_launch(compiled.Planned(0, None, {}), Compiled(), 0) is None
