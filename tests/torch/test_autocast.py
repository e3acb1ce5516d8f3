"""Autocast gives each op the result dtype of torch's own; GradScaler; checkpointing, of everything and selective."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fused_ops import fused_linear
from fused_ops.nn import FusedLayerNorm, FusedLinear
from tests.torch.calls import CALL, Call, OperatorsSeen, each_call

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)  # the lists of what is cast differ
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@each_call
def test_result_and_gradient_dtypes_are_torchs(call: Call, autocast: torch.dtype, dtype: torch.dtype, device: str) -> None:
    ours, theirs = ([t.to(device).requires_grad_() for t in call.tensors(dtype)] for _ in range(2))
    with torch.autocast(device, dtype=autocast):
        out = call.ours(*ours)
        expected = call.aten(*theirs)
    assert out.dtype is expected.dtype
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if out.dtype.itemsize == 2 else {}
    torch.testing.assert_close(out, expected, **tolerance)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours, theirs):
        assert mine.grad is not None
        assert mine.grad.dtype is dtype
        size = other.grad.abs().max().item()  # torch rounds more often, and rounds sums of terms of this size
        torch.testing.assert_close(mine.grad, other.grad, atol=max(0.3, 2**-7 * size), rtol=0.1)


@each_call
def test_autocast_disabled_inside(call: Call) -> None:
    tensors = call.tensors(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", enabled=False):
        assert call.ours(*tensors).dtype is torch.bfloat16


@each_call
def test_compiled_under_autocast(call: Call) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call.ours, fullgraph=True, backend="aot_eager")
    tensors = call.tensors()
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out, expected = compiled(*tensors), call.aten(*tensors)
        assert out.dtype is expected.dtype
        torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)


def test_training_with_a_grad_scaler() -> None:
    """The scaled loss trains as the unscaled one does; an overflow is noticed and its step skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(FusedLayerNorm(8), FusedLinear(8, 8, activation="silu"))
    twin = nn.Sequential(FusedLayerNorm(8), FusedLinear(8, 8, activation="silu"))
    twin.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    x = torch.randn(16, 8)
    for net, optimizer in zip((model, twin), optimizers):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
        if net is model:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizers[0].zero_grad()
    scaler.scale(model(x * float("inf")).sum()).backward()
    scaler.step(optimizers[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    scaler.update()
    assert scaler.get_scale() < 1024.0


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_call
def test_checkpoint(call: Call, use_reentrant: bool) -> None:
    once, again = call.tensors(requires_grad=True), call.tensors(requires_grad=True)
    call.ours(*once).square().sum().backward()
    checkpoint(call.ours, *again, use_reentrant=use_reentrant).square().sum().backward()
    for a, b in zip(once, again):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("policy", "forwards"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)])
def test_selective_checkpoint_by_our_operators_name(policy: CheckpointPolicy, forwards: int) -> None:
    """The raw operator is what a policy names: saved, it runs once; recomputed, twice. The gradients are the same bits."""
    linear = torch.ops.fused_ops.linear_fwd.default

    def choose(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if op is linear else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.sin(fused_linear(torch.cos(x), w, b, "gelu"))

    call = CALL["linear"]
    once, again = call.tensors(requires_grad=True), call.tensors(requires_grad=True)
    layer(*once).sum().backward()
    with OperatorsSeen() as seen:
        context = partial(create_selective_checkpoint_contexts, choose)
        checkpoint(layer, *again, use_reentrant=False, context_fn=context).sum().backward()
    assert seen.count(str(linear)) == forwards
    for a, b in zip(once, again):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
