"""Clusters without a GPU that has them: their compiled kernels, emulated, hold the contract and order what they share.

FUSED_OPS_TEST_TRITONS, folders joined by ":" that each hold another version's `triton`, repeats it for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .ptx_emulator import GLOBAL, Emulator

ROOT = Path(__file__).parents[2]
TRITONS = ["", *filter(None, os.environ.get("FUSED_OPS_TEST_TRITONS", "").split(":"))]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
@pytest.mark.parametrize("triton", TRITONS, ids=lambda path: path or "installed")
def test_compiled_clusters_hold_the_contract_when_emulated(triton: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = ":".join(filter(None, [triton, str(ROOT), environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "tests.kernels.emulate_clusters"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = list(map(json.loads, done.stdout.splitlines()))
    if not results:
        pytest.skip("clusters need Triton 3.8 or later")
    controls = [result for result in results if "without" in result]
    results = [result for result in results if "without" not in result]
    assert len({result["kernel"] for result in results}) == 5
    for result in results:
        assert result["races"] == [], result
        assert result["cluster_reads"] > 0, result
        assert (result["unread"], result["not_stored_once"]) == (0, 0), result
        assert result["read_again"] <= 4 * 14, result  # the edges of 4 rows, by the threads of one program
    assert controls
    assert all(result["races"] for result in controls), "a missing barrier is found"


def _emulated(body: str) -> Emulator:
    """Two programs of 32 threads, a cluster, on 64 words of memory; parameter 0 is its address."""
    memory = np.arange(64, dtype=np.uint32).view(np.uint8).copy()
    emulator = Emulator(1, 2, 32, [GLOBAL], memory)
    emulator.run(".visible .entry k()\n{\n" + body.replace("; ", ";\n") + "\n\tret;\n}")
    return emulator


SHARE = """
    ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank; shl.b32 %r3, %r2, 5;
    or.b32 %r4, %r3, %r1; mul.wide.u32 %rd2, %r4, 4; add.s64 %rd3, %rd1, %rd2; ld.global.b32 { %r5 }, [ %rd3 + 0 ];
    shl.b32 %r6, %r1, 2; mov.b32 %r7, global_smem; add.s32 %r8, %r7, %r6; st.shared.b32 [%r8], %r5;
    BARRIER
    xor.b32 %r9, %r2, 1; mapa.shared::cluster.u32 %r10, %r8, %r9; ld.shared::cluster.b32 %r11, [%r10];
    setp.lt.u32 %p1, %r1, 31; @%p1 st.global.b32 [ %rd3 + 0 ], { %r11 };
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
"""
CLUSTER_BARRIER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def test_the_emulator_moves_values_between_programs() -> None:
    emulator = _emulated(SHARE.replace("BARRIER", CLUSTER_BARRIER))
    words = emulator.memory.view(np.uint32)
    assert words.tolist() == [*range(32, 63), 31, *range(31), 63]
    assert emulator.races == []
    assert emulator.loads.tolist() == [1] * 256
    assert int(emulator.stores.sum()) == 4 * 62


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;", "barrier.cluster.arrive.aligned;"])
def test_the_emulator_finds_what_no_barrier_orders(barrier: str) -> None:
    (race,) = _emulated(SHARE.replace("BARRIER", barrier)).races
    assert race.startswith("reads another program's store")


def test_the_emulator_refuses_what_it_does_not_know() -> None:
    with pytest.raises(NotImplementedError, match="vote"):
        _emulated("vote.sync.all.pred %p1, %p2, -1;")
