"""The host's cost of a launch for a number of rows that was not seen before, and of one launch beside another: as counts of calls.

Triton's compiled kernels are stand-ins here, and CPU tensors pass for tensors of a GPU: only what the host does is counted.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fused_ops._runtime import compiled, device, launch, plans, settings, tables
from fused_ops.ops.linear.gated_linear_launch import gated_linear_launch
from fused_ops.ops.linear.linear_launch import linear_launch
from fused_ops.ops.norm.layer_norm_launch import layer_norm_bwd_launch, layer_norm_launch
from fused_ops.ops.softmax.softmax_launch import softmax_bwd_launch, softmax_launch
from tests.runtime.test_launch_path import Compiled, CudaLauncher

DRAWN, MOST_ROWS, N = 10_000, 32768, 64
UNSEEN = 1.5  # times the calls of a launch whose number of rows was seen
LIMITS = {"linear": 1.2, "layer_norm_bwd": 1.8}  # times the calls of layer norm's forward
MOST_COMPILED = 100  # kernels, of one launcher over all numbers of rows: configurations times specialisations


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that went through Triton, which compiles there."""
    names: list[str] = []

    def through(kernel: Any, *_: Any) -> Any:
        names.append(kernel.fn.__name__)
        return Compiled(CudaLauncher())

    monkeypatch.setattr(compiled, "_through_triton", through)
    monkeypatch.setattr(settings, "INTERPRET", False)
    monkeypatch.setattr(device, "_cuda_properties", lambda _: ((9, 0), 132))
    monkeypatch.setattr(torch.Tensor, "get_device", int)  # 0; like torch's own it is written in C
    monkeypatch.setattr(launch, "_current_device", int)
    monkeypatch.setattr(launch, "_current_stream", int)
    monkeypatch.setitem(tables._tables, 0, {})
    plans.forget_plans()
    yield names
    plans.forget_plans()


def launchers() -> dict[str, Callable[[int], Callable[[], Any]]]:
    """name -> a function that makes the call of a launcher over so many rows."""
    flat = torch.zeros(MOST_ROWS * N, dtype=torch.bfloat16)
    w, statistics = torch.zeros(N, dtype=torch.bfloat16), torch.zeros(MOST_ROWS)
    weight = torch.zeros(N, N, dtype=torch.bfloat16)

    def over(call: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
        def of(M: int) -> Callable[[], Any]:
            x, mean = flat[: M * N].view(M, N), statistics[:M]
            return lambda: call(x, mean)

        return of

    return {
        "softmax_fwd": over(lambda x, _: softmax_launch(x, 1, None)),
        "softmax_bwd": over(lambda x, _: softmax_bwd_launch(x, x, 1, x.dtype)),
        "layer_norm_fwd": over(lambda x, _: layer_norm_launch(x, w, w, 1e-5)),
        "layer_norm_bwd": over(lambda x, m: layer_norm_bwd_launch(x, x, w, m, m, True, True, True, None)),
        "linear": over(lambda x, _: linear_launch(x, weight, w, "gelu", True)),
        "gated_linear": over(lambda x, _: gated_linear_launch(x, weight, weight, None, None, "silu", True)),
    }


def calls_of(functions: list[Callable[[], Any]]) -> int:
    """How many functions in Python and in C the functions call."""
    events: list[str] = []
    gc.disable()
    sys.setprofile(lambda _, event, __: events.append(event))
    try:
        for function in functions:
            function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return events.count("call") + events.count("c_call") - 1  # setprofile's own


@pytest.mark.parametrize("name", launchers())
def test_an_unseen_number_of_rows_costs_little(name: str, compilations: list[str]) -> None:
    of = launchers()[name]
    of(1000)(), of(1000)()
    seen = calls_of([of(1000)] * 100) / 100
    draw = random.Random(0)
    drawn = [draw.randint(1, MOST_ROWS) for _ in range(DRAWN)]
    unseen = calls_of([of(M) for M in drawn]) / DRAWN
    assert unseen <= UNSEEN * seen
    assert 2 <= len(compilations) <= MOST_COMPILED
    before = len(compilations)
    calls_of([of(M) for M in drawn[:1000]])
    assert len(compilations) == before, "what was compiled is kept"


@pytest.mark.parametrize("name", LIMITS)
def test_a_launch_beside_layer_norm(name: str, compilations: list[str]) -> None:
    counts = {}
    for launcher in ("layer_norm_fwd", name):
        call = launchers()[launcher](1024)
        call(), call()
        counts[launcher] = calls_of([call])
    assert counts[name] <= LIMITS[name] * counts["layer_norm_fwd"], counts
    assert compilations
