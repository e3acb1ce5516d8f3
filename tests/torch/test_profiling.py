"""What profilers show: names in torch.profiler, NVTX ranges by option, FLOPs in FlopCounterMode."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fused_ops import REGISTRY, fused_linear
from fused_ops.testing import Op, flops
from tests import process
from tests.torch.calls import Call, each_call


@each_call
def test_torch_profiler_shows_forward_and_backward_by_name(call: Call, tmp_path: Path) -> None:
    tensors = call.tensors(requires_grad=True)
    call.ours(*tensors)  # the fast path, taken before, does not hide the next call
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        call.ours(*tensors).sum().backward()
    names = {event.key for event in prof.key_averages()}
    assert {f"fused_ops::{call.name}_fwd", f"fused_ops::{call.name}_bwd"} <= names
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == f"fused_ops::{call.name}_fwd" for event in events)


def count(function: Any, tensors: list[Tensor], backward: bool) -> int:
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    with FlopCounterMode(display=False) as counter:
        out = function(*leaves)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@each_call
def test_flops_are_those_of_the_eager_baseline(call: Call, backward: bool) -> None:
    tensors = call.tensors(requires_grad=True)
    counted = count(call.ours, tensors, backward)
    assert counted == count(call.aten, tensors, backward)
    assert (counted > 0) == call.op.roles.multiplies


@each_call
def test_flops_of_each_gradient_alone_are_those_of_the_eager_baseline(call: Call) -> None:
    for needed in range(len(call.letters)):
        tensors = [t.requires_grad_(i == needed) for i, t in enumerate(call.tensors())]
        assert count(call.ours, tensors, True) == count(call.aten, tensors, True), call.letters[needed]


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items() if not op.trains])
def test_flops_without_gradients(op: Op) -> None:
    """Of an op that does not train: two for each element of the result and each of K."""
    sample = op.example("cpu", torch.bfloat16)
    x = sample.args[0]
    with FlopCounterMode(display=False) as counter:
        out = op.public(*sample.args, **sample.kwargs)
    product = 2 * out.numel() * x.shape[-1] if op.roles.multiplies else 0
    assert counter.get_total_flops() == product


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_flops_of_the_gradients_that_are_needed(wanted: tuple[bool, bool]) -> None:
    x, w = (torch.randn(6, 8).requires_grad_(wanted[0]), torch.randn(5, 8).requires_grad_(wanted[1]))
    ours = count(lambda x, w: fused_linear(x, w, None, "silu"), [x, w], True)
    assert ours == count(lambda x, w: F.silu(F.linear(x, w)), [x, w], True) == 2 * 6 * 5 * 8 * (1 + sum(wanted))


# operator -> (arguments with shapes in place of tensors, FLOPs): x is (2, 3, 8), y (2, 3, 5), z (2, 3, 7)
X, Y, Z, W, V = (2, 3, 8), (2, 3, 5), (2, 3, 7), (5, 8), (7, 5)
XW, YV = 2 * 6 * 5 * 8, 2 * 6 * 7 * 5
FLOPS: list[tuple[str, tuple[Any, ...], int]] = [
    ("softmax_fwd", (X, 1, None), 0),
    ("softmax_bwd", (X, X, 1, torch.float32), 0),
    ("layer_norm_fwd", (X, (8,), (8,), 1e-5), 0),
    ("layer_norm_bwd", (X, X, (8,), (2, 3), (2, 3), True, True, True, None), 0),
    ("layer_norm_fp8_fwd", (X, None, None, 1e-5), 0),
    ("linear_fwd", (X, W, None, "gelu", True), XW),
    ("linear_fp8_fwd", (X, W, (1,), (1,), (5,), "none", torch.bfloat16), XW),
    ("linear_bwd", (Y, X, W, Y, "gelu", True, True, True), 2 * XW),
    ("linear_bwd", (Y, X, W, Y, "gelu", True, False, False), XW),
    ("linear_bwd", (Y, X, W, Y, "gelu", False, True, False), XW),
    ("linear_bwd", (Y, X, W, Y, "gelu", False, False, True), 0),
    ("linear_bwd", (Y, Y, None, Y, "gelu", True, False, True), 0),
    ("gated_linear_fwd", (X, W, W, None, None, "silu", False), 2 * XW),
    ("gated_linear_bwd", (Y, X, W, W, Y, Y, "silu", True, True, True, True, True), 4 * XW),
    ("gated_linear_bwd", (Y, X, W, W, Y, Y, "silu", True, False, False, False, True), 2 * XW),
    ("gated_linear_bwd", (Y, X, W, W, Y, Y, "silu", False, True, False, True, False), XW),
    ("gated_linear_bwd", (Y, X, W, W, Y, Y, "silu", False, False, False, True, True), 0),
    ("mlp_fwd", (X, W, (5,), V, None, "gelu", True, True), XW + YV),
    ("mlp_bwd", (Z, V, Y, Y, "gelu", True, True, True, True), 2 * YV),
    ("mlp_bwd", (Z, V, Y, Y, "gelu", True, False, False, True), YV),
    ("mlp_bwd", (Z, V, Y, Y, "gelu", False, True, False, False), YV),
    ("mlp_bwd", (Z, V, Y, Y, "gelu", False, False, True, False), YV),
    ("mlp_bwd", (Z, V, Y, Y, "gelu", False, False, False, True), 0),
]


@pytest.mark.parametrize(("name", "args", "expected"), FLOPS, ids=[f"{i}-{row[0]}" for i, row in enumerate(FLOPS)])
def test_flops_by_the_roles(name: str, args: tuple[Any, ...], expected: int) -> None:
    (raw,) = [raw for op in REGISTRY.values() for raw in op.raw if raw.name == name]
    assert flops(raw, args) == expected


def test_a_counter_made_before_the_first_call_counts_it() -> None:
    code = (
        "import torch, fused_ops, sys\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "counter = FlopCounterMode(display=False)\n"
        "with counter:\n"
        "    fused_ops.fused_linear(torch.randn(2, 3), torch.randn(4, 3))\n"
        "assert counter.get_total_flops() == 48, counter.get_total_flops()\n"
    )
    process.output(code)


def test_nvtx_ranges_by_option() -> None:
    """One range a raw operator, closed also when it raises; none without the option. A stand-in takes NVTX's place."""
    code = (
        "import torch\n"
        "events = []\n"
        "torch.cuda.nvtx.range_push = events.append\n"
        "torch.cuda.nvtx.range_pop = lambda: events.append('pop')\n"
        "import fused_ops\n"
        "del events[:]\n"
        "x = torch.randn(2, 4, requires_grad=True)\n"
        "fused_ops.fused_softmax(x).sum().backward()\n"
        "with torch.no_grad(): fused_ops.fused_layernorm(x, (4,))\n"
        "try: torch.ops.fused_ops.softmax_fwd(x.detach(), 7, None)\n"
        "except IndexError: pass\n"
        "print(' '.join(events))\n"
    )
    for option, expected in (
        ("1", "fused_ops::softmax_fwd pop fused_ops::softmax_bwd pop fused_ops::layer_norm_fwd pop fused_ops::softmax_fwd pop"),
        ("0", ""),
    ):
        env = os.environ | {"FUSED_OPS_NVTX": option}
        assert process.output(code, env=env).strip() == expected


def test_nvtx_asked_for_where_there_is_none() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch was built with NVTX")
    env = os.environ | {"FUSED_OPS_NVTX": "1"}
    code = "import torch, fused_ops; fused_ops.fused_softmax(torch.randn(2, 3))"
    done = process.run(code, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this PyTorch was built without NVTX") == 1
