"""Where kernels in Gluon may run, and what becomes of a GPU that refuses one."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fused_ops._runtime import backend, device, gluon, settings, tables
from fused_ops._runtime import launch as launch_module
from fused_ops._runtime.compiled import Planned
from fused_ops._runtime.plans import forget_plans, plan
from fused_ops.kernels.config import SHARED_COLUMNS
from fused_ops.ops.norm import layer_norm_launch
from fused_ops.ops.softmax import softmax_launch

BF16 = torch.bfloat16
PLANNED: dict[str, tuple[Any, str, tuple[Any, ...]]] = {  # the module, its function, what it is called with
    "softmax_fwd": (softmax_launch, "_fwd_plan", (4, 128256, 128256, 1, BF16, BF16, 0, True, True)),
    "softmax_bwd": (softmax_launch, "_bwd_plan", (4, 40000, 40000, 1, 40008, 1, BF16, BF16, BF16, 0, True, True)),
    "layer_norm_bwd": (
        layer_norm_launch, "_bwd_plan", (4, 16384, 16384, 1, 16392, 1, BF16, BF16, BF16, True, True, True, 0, True),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """GPUs of compute capability 9.0 that have given up nothing, with kernels compiled rather than interpreted."""
    monkeypatch.setattr(device, "_cuda_properties", lambda _: ((9, 0), 132))
    monkeypatch.setattr(gluon, "interpreting", lambda: False)
    monkeypatch.setattr(gluon, "_given_up", set())
    monkeypatch.setattr(settings, "GLUON", True)
    monkeypatch.setattr(tables, "_tables", {0: {}})
    forget_plans()
    yield
    forget_plans()


@pytest.mark.parametrize(("major", "wanted"), [(8, False), (9, True), (10, True), (12, False)])
def test_the_gpu_decides(major: int, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cuda_properties", lambda _: ((major, 0), 132))
    assert gluon.gluon_wanted(0) is wanted


def test_the_variable_and_the_interpreter_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gluon.gluon_wanted(0)
    with monkeypatch.context() as patch:
        patch.setattr(settings, "GLUON", False)
        assert not gluon.gluon_wanted(0)
    monkeypatch.setattr(gluon, "interpreting", lambda: True)
    assert not gluon.gluon_wanted(0)


def test_a_triton_without_the_names_uses_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    backend.warn_once.cache_clear()
    gluon._importable.cache_clear()
    monkeypatch.setitem(sys.modules, "fused_ops.kernels.shared_rows", None)
    monkeypatch.delattr("fused_ops.kernels.shared_rows", raising=False)
    with caplog.at_level(logging.WARNING, "fused_ops"):
        assert not gluon.gluon_wanted(0)
    gluon._importable.cache_clear()
    assert "cannot be imported" in caplog.text


@plan
def _rows(N: int, device: int) -> Planned:
    wanted = gluon.gluon_wanted(device)
    planned = Planned(device, None, {"gluon": wanted}, takes_rows=False)
    return gluon.or_no_gluon(planned, functools.partial(_rows, N, device)) if wanted else planned


def test_a_gpu_that_refuses_one_runs_none_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launched = []

    def run(self: Planned, *_: Any) -> None:
        launched.append(self.options["gluon"])
        if self.options["gluon"]:
            raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(Planned, "run", run)
    monkeypatch.setattr(launch_module, "_current_device", lambda: 0)
    monkeypatch.setattr(launch_module, "_current_stream", lambda _: 0)
    backend.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fused_ops"):
        for _ in range(2):
            launch_module.launch(_rows(128256, 0), 3, torch.empty(1))
    assert launched == [True, False, False]
    (record,) = caplog.records
    assert "GPU 0 runs none (RuntimeError: out of resource: shared memory)" in record.getMessage()
    assert gluon.gluon_wanted(1)  # another GPU still does
    assert not gluon.gluon_wanted(0)


@pytest.mark.parametrize("kernel", SHARED_COLUMNS)
def test_after_a_refusal_the_same_rows_are_planned_without(kernel: str) -> None:
    module, function, arguments = PLANNED[kernel]
    planned = getattr(module, function)(*arguments)
    assert planned.kernel.__name__ == f"{kernel}_shared_kernel"
    assert planned.grid(1 << 20) == 132
    again = planned.instead(RuntimeError("no"))
    assert again.kernel.__name__ != planned.kernel.__name__
    assert "_shared_" not in again.kernel.__name__
    assert not gluon.gluon_wanted(0)


@pytest.mark.parametrize("kernel", SHARED_COLUMNS)
def test_addresses_that_are_no_vectors_are_planned_without(kernel: str) -> None:
    """The last argument says whether all begin at 16 bytes: so does nothing that a compiler traces with."""
    module, function, arguments = PLANNED[kernel]
    assert "_shared_" not in getattr(module, function)(*arguments[:-1], False).kernel.__name__


def test_the_launchers_ask_from_the_length_on_that_the_kernels_name() -> None:
    """They say it themselves: importing fused_ops imports no kernels."""
    asked = {
        "softmax_fwd": softmax_launch.FWD_SHARED_FROM,
        "softmax_bwd": softmax_launch.BWD_SHARED_FROM,
        "layer_norm_bwd": layer_norm_launch.BWD_SHARED_FROM,
    }
    assert asked == {kernel: least for kernel, (least, _) in SHARED_COLUMNS.items()}
