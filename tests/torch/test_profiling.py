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

import fused_ops
from fused_ops import REGISTRY, fused_linear
from fused_ops._torch.flops import FORMULAS
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
    assert (counted > 0) == (call.name == "linear")


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_flops_of_the_gradients_that_are_needed(wanted: tuple[bool, bool]) -> None:
    x, w = (torch.randn(6, 8).requires_grad_(wanted[0]), torch.randn(5, 8).requires_grad_(wanted[1]))
    ours = count(lambda x, w: fused_linear(x, w, None, "silu"), [x, w], True)
    assert ours == count(lambda x, w: F.silu(F.linear(x, w)), [x, w], True) == 2 * 6 * 5 * 8 * (1 + sum(wanted))


def test_flops_of_the_families_of_several_products() -> None:
    x, wg, wu = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(5, 8, requires_grad=True),
        torch.randn(5, 8, requires_grad=True),
    )
    for backward in (False, True):
        eager = count(lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), [x, wg, wu], backward)
        assert count(lambda x, g, u: fused_ops.fused_gated_linear(x, g, u), [x, wg, wu], backward) == eager
        w2 = torch.randn(8, 5, requires_grad=True)
        eager = count(lambda x, a, c: F.linear(F.gelu(F.linear(x, a)), c), [x, wg, w2], backward)
        assert count(lambda x, a, c: fused_ops.fused_mlp(x, a, None, c, None, "gelu"), [x, wg, w2], backward) == eager


def test_every_op_with_a_product_has_a_formula() -> None:
    for name, op in REGISTRY.items():
        products = "linear" in name or name == "mlp"
        assert {raw.name in FORMULAS for raw in op.raw} == {products}


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
