"""Whether rows run as clusters, and what happens where a GPU refuses one. tests/ptx/test_clusters.py executes them."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import pytest
import torch

from fused_ops._runtime import backend, clusters
from fused_ops._runtime import launch as launch_module
from fused_ops._runtime.compiled import Planned
from fused_ops._runtime.plans import plan
from fused_ops.kernels.config import RowConfig
from fused_ops.ops.norm import layer_norm_launch
from fused_ops.ops.softmax import softmax_launch
from fused_ops.testing import KERNELS, forced
from tests import process


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The num_ctas of each launch on a GPU of compute capability 9.0 that refuses clusters."""
    monkeypatch.setattr(clusters, "properties_of", lambda _: ((9, 0), 132))
    monkeypatch.setattr(clusters, "_triton", lambda: (3, 8))
    monkeypatch.setattr(clusters, "_given_up", set())
    monkeypatch.setattr(launch_module, "_current_device", lambda: 0)
    monkeypatch.setattr(launch_module, "_current_stream", lambda _: 0)
    made: list[int] = []

    def launch(planned: Planned, *_: Any) -> None:
        made.append(planned.options.get("num_ctas", 1))
        if made[-1] > 1:
            raise RuntimeError("Triton Error [CUDA]: cluster misconfiguration\nmore")

    monkeypatch.setattr(Planned, "run", launch)
    return made


@plan
def _rows(N: int, device: int) -> Planned:
    wanted = clusters.clusters_wanted(device)
    planned = Planned(device, None, {"num_ctas": 8} if wanted else {}, takes_rows=False)
    return clusters.or_no_cluster(planned, functools.partial(_rows, N, device)) if wanted else planned


def test_a_gpu_that_refuses_a_cluster_runs_none_from_then_on(launched: list[int], caplog: pytest.LogCaptureFixture) -> None:
    backend.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fused_ops"):
        for _ in range(2):
            launch_module.launch(_rows(128256, 0), 3, torch.empty(1))
    assert launched == [8, 1, 1]
    (record,) = caplog.records
    assert "GPU 0 runs none (RuntimeError: Triton Error [CUDA]: cluster misconfiguration)" in record.getMessage()
    assert clusters.can_cluster(1)  # another GPU still does
    assert not clusters.can_cluster(0)


ROWS = (2, 65536, 65552, 1)  # row_bits, N, and the strides of a tensor's rows and columns
HALF, SINGLE = torch.bfloat16, torch.float32
PLANNED: dict[
    str, tuple[Any, str, tuple[Any, ...]]
] = {  # the module, its function, what it is called with; no two arguments alike
    "softmax_fwd": (softmax_launch, "_fwd_plan", (*ROWS, HALF, SINGLE, 0, True, False)),
    "softmax_bwd": (softmax_launch, "_bwd_plan", (2, 65536, 65568, 1, 65552, 1, HALF, SINGLE, torch.float16, 0, True, False)),
    "layer_norm_fwd": (layer_norm_launch, "_fwd_plan", (*ROWS, 1e-5, HALF, SINGLE, torch.float16, True, 0)),
}


@pytest.mark.parametrize("kernel", [name for name, tuned in KERNELS.items() if tuned.clustered])
def test_after_a_refusal_the_same_rows_are_planned(kernel: str, launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, arguments = PLANNED[kernel]
    again: list[Any] = []
    name = "_clusters" if hasattr(module, "_clusters") else "_row_kernels"
    found = getattr(module, name)()
    monkeypatch.setattr(module, name, lambda: (*found[:-1], lambda planned, once_more: again.append(once_more) or planned))
    with forced(kernel, RowConfig(block_m=1, block_n=65536, num_warps=8, num_ctas=8)):
        planned = getattr(module, function)(*arguments)
    assert planned.options["num_ctas"] == 8
    (once_more,) = again
    assert once_more.func is getattr(module, function)
    assert once_more.args == arguments


def test_other_errors_are_raised(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any) -> None:
        raise RuntimeError("no such memory")

    monkeypatch.setattr(Planned, "run", launch)
    with pytest.raises(RuntimeError, match="no such memory"):
        launch_module.launch(Planned(0, None, {}), 3, torch.empty(1))
    assert clusters.can_cluster(0)


@pytest.mark.parametrize(("value", "wanted"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_decides(value: str | None, wanted: bool) -> None:
    env = {k: v for k, v in os.environ.items() if k != "FUSED_OPS_CLUSTER"} | (
        {} if value is None else {"FUSED_OPS_CLUSTER": value}
    )
    code = "from fused_ops._runtime import settings; print(settings.CLUSTER)"
    assert process.output(code, env=env).strip() == str(wanted)
