"""The norms take every mix of float dtypes of input and parameters on every path, and on every path mean the same by it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jvp, vjp, vmap

from fused_ops import compile_with_aten, fuse, fused_layernorm, fused_rmsnorm
from fused_ops.nn import FusedLayerNorm, FusedRMSNorm
from fused_ops.ops.norm import arguments
from fused_ops.testing import INTERPRET, Op, Sample, decompositions
from tests.contract import hold_to_contract
from tests.torch.mixes import (
    DTYPES,
    NORMS,
    TRAINED_NORMS,
    N,
    bounds_of,
    call_of,
    every_mix,
    exact_of,
    far,
    outside,
    some_mixes,
    tensors_of,
)

each_norm: Any = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in NORMS.items()])
each_trained: Any = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in TRAINED_NORMS.items()])
aten_mode = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")
HALF = (torch.float16, torch.bfloat16)


def dy_of(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


@each_trained
def test_raw_operators_are_within_the_contract(op: Op) -> None:
    for mix in some_mixes(op):
        input, *parameters = tensors_of(mix)
        hold_to_contract(op, Sample(str(mix), (input, (N,), *parameters)))


@each_trained
def test_eager(op: Op) -> None:
    """Without a gradient and with: the fast path, and ATen's own layer norm where it takes the mix."""
    wrong = []
    for mix in some_mixes(op) if INTERPRET else every_mix(op):
        call, given = call_of(op, tensors_of(mix))
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        y = call(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy_of(y))
        bounds = bounds_of(call, op, given, dy_of(y))
        dtypes = [tensor.dtype for tensor in (given[0], *given)]
        wrong += [(mix, what) for what in outside((y, *gradients), bounds, dtypes)]
        wrong += [(mix, "without a gradient", what) for what in outside([call(*given)], bounds[:1], dtypes[:1])]
    assert not wrong


@each_norm
def test_no_mix_is_warned_of(op: Op, recwarn: pytest.WarningsRecorder) -> None:
    for mix in some_mixes(op):
        call, given = call_of(op, tensors_of(mix))
        call(*given)
    assert not list(recwarn)


@each_trained
def test_create_graph_and_a_gradient_penalty(op: Op) -> None:
    """First gradients within the contract; those of a loss of y and of the gradients near the ones in fp64."""
    wrong: list[Any] = []
    for mix in some_mixes(op)[:: 3 if INTERPRET else 1]:
        tensors = tensors_of(mix)
        (call, given), exact = call_of(op, tensors), exact_of(op, tensors)
        found = []
        for function, leaves in ((call, given), (exact, [tensor.double() for tensor in given])):
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            y = function(*leaves)
            first = torch.autograd.grad(y, leaves, dy_of(y), create_graph=True)
            loss = y.double().square().sum() + sum(g.double().square().sum() for g in first)
            second = torch.autograd.grad(loss, leaves, create_graph=True)
            third = torch.autograd.grad(sum(g.double().square().sum() for g in second), leaves[0])
            found.append((y, first, (*second, *third)))
        y, first, ours = found[0]
        bounds, dtypes = bounds_of(call, op, given, dy_of(y)), [tensor.dtype for tensor in (given[0], *given)]
        wrong += [(mix, what) for what in outside((y, *first), bounds, dtypes)]
        wrong += [(mix, i, g) for i, (g, true) in enumerate(zip(ours[:-1], found[1][2])) if far(g, true, mix)]
        wrong += [(mix, i) for i, (g, leaf) in enumerate(zip(ours, (*given, given[0]))) if g.dtype is not leaf.dtype]
    assert not wrong


@each_trained
def test_transforms(op: Op) -> None:
    """vjp, and grad over vmap, in which tensors do not say that they need a gradient: within the contract, as backward is; jvp and
    vmap near fp64."""
    wrong: list[Any] = []
    for mix in some_mixes(op):
        tensors = tensors_of(mix)
        (call, given), exact = call_of(op, tensors), exact_of(op, tensors)
        wide, numbers = [tensor.double() for tensor in given], tuple(range(len(given)))
        y, pull = vjp(call, *given)
        dy = dy_of(y)
        bounds, dtypes = bounds_of(call, op, given, dy), [tensor.dtype for tensor in (given[0], *given)]
        wrong += [(mix, "vjp", what) for what in outside((y, *pull(dy)), bounds, dtypes)]
        rows = vmap(call, (0, *(None for _ in given[1:])))
        weighted = grad(lambda *t: (rows(*t).double() * dy).sum(), numbers)  # noqa: B023
        wrong += [(mix, "grad of vmap", what) for what in outside(weighted(*given), bounds[1:], dtypes[1:])]
        for mine, true in zip(jvp(call, tuple(given), tuple(given)), jvp(exact, tuple(wide), tuple(wide))):
            wrong += [(mix, "jvp", mine)] if far(mine, true, mix) or mine.dtype is not given[0].dtype else []
        for i in numbers:
            many, alone = ([torch.stack([t, -t]) if i == j else t for j, t in enumerate(ts)] for ts in (given, wide))
            dims = tuple(0 if i == j else None for j in numbers)
            wrong += [(mix, "vmap", i)] if far(vmap(call, dims)(*many), vmap(exact, dims)(*alone), mix) else []
    assert not wrong


@each_norm
def test_hessian_and_jvp_run(op: Op) -> None:
    for mix in some_mixes(op):
        call, given = call_of(op, tensors_of(mix, rows=1))
        jvp(call, tuple(given), tuple(given))
        vmap(call, (0, *(None for _ in given[1:])))(*given)
        if op.trains:
            hessian(lambda *t: call(*t).double().square().sum(), tuple(range(len(given))))(*given)  # noqa: B023


@aten_mode
@each_trained
def test_half_precision_derivatives_are_within_the_contract(op: Op) -> None:
    """ATen's own layer norm in half precision, differentiated under create_graph or a transform, was up to 8,500 times outside."""
    wrong: list[Any] = []
    for dtype in HALF:
        for sample in op.samples("cpu", dtype):
            if len(sample.args[1]) > 1 or "slow" in sample.tags:
                continue
            at = [i for i, value in enumerate(sample.args) if isinstance(value, Tensor)]

            def call(*given: Tensor) -> Any:
                args = list(sample.args)  # noqa: B023
                for i, tensor in zip(at, given):  # noqa: B023
                    args[i] = tensor
                return op.public(*args)

            given = [sample.args[i] for i in at]
            leaves = [tensor.detach().requires_grad_() for tensor in given]
            y, pull = vjp(call, *given)
            bounds = bounds_of(call, op, given, dy_of(y))[1:]
            graph = torch.autograd.grad(call(*leaves), leaves, dy_of(y), create_graph=True)
            for gradients in (graph, pull(dy_of(y))):
                wrong += [(dtype, sample.name, what) for what in outside(gradients, bounds, [t.dtype for t in given])]
    assert not wrong


@each_norm
def test_tensors_without_data(op: Op) -> None:
    with FakeTensorMode():
        for mix in some_mixes(op)[::3]:
            for device in ("meta", "cuda"):
                shapes = ((3, N), (N,), (N,))
                made = [None if dtype is None else torch.empty(s, dtype=dtype, device=device) for s, dtype in zip(shapes, mix)]
                call, given = call_of(op, made)
                out = call(*given)
                for result in out if isinstance(out, tuple) else (out,):
                    assert result.device.type == device
                assert not op.trains or (out.dtype, out.shape) == (mix[0], (3, N))
                if op.trains and device != "cuda":
                    leaves = [tensor.requires_grad_() for tensor in given]
                    gradients = torch.autograd.grad(call(*leaves).sum(), leaves)
                    assert [g.dtype for g in gradients] == [dtype for dtype in mix if dtype is not None]


@aten_mode
@pytest.mark.parametrize("aten", [False, True])
def test_compiled_in_one_graph(aten: bool) -> None:
    """Forward and backward of a few mixes of each op at once."""
    calls = [call_of(op, tensors_of(mix)) for op in TRAINED_NORMS.values() for mix in some_mixes(op)[3::9]]

    def all_of(every: list[list[Tensor]]) -> list[Tensor]:
        return [call(*given) for (call, _), given in zip(calls, every)]

    results = []
    compile_with_aten(enabled=aten)
    try:
        torch._dynamo.reset()
        for function in (torch.compile(all_of, fullgraph=True, backend="aot_eager"), all_of):
            every = [[tensor.clone().requires_grad_() for tensor in given] for _, given in calls]
            outs = function(every)
            sum(out.double().square().sum() for out in outs).backward()  # type: ignore[union-attr]
            results.append((*outs, *[leaf.grad for leaves in every for leaf in leaves]))
    finally:
        compile_with_aten(enabled=None)
    for compiled, eager in zip(*results):
        assert compiled.dtype is eager.dtype
        half = eager.dtype in HALF
        torch.testing.assert_close(compiled, eager, atol=3e-2 if half else 1e-2, rtol=2e-2)


class Both(nn.Module):
    """A layer norm and an RMS norm of one input."""

    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return fused_layernorm(x, [4], w, b), fused_rmsnorm(x, [4], w)


@aten_mode
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["script", "trace", "export"])
def test_exported(way: str) -> None:
    block = Both()
    scripted: Any = torch.jit.script(block) if way == "script" else None
    mixes = [(a, b, c) for i, a in enumerate(DTYPES) for j, b in enumerate(DTYPES) for c in (DTYPES[(i + j) % 4],)]
    for mix in mixes[::8] if way == "export" else mixes:
        given = tuple(t for t in tensors_of(mix) if t is not None)
        if way == "export":
            program = torch.export.export(block, given).run_decompositions(decompositions())
            assert "fused_ops" not in str(program.graph)
            scripted = program.module()
        elif way == "trace":
            scripted = torch.jit.trace(block, given, check_trace=False)
            assert "fused_ops::" not in str(scripted.inlined_graph)
        for ours, eager in zip(scripted(*given), block(*given)):
            assert ours.dtype is eager.dtype is mix[0]
            torch.testing.assert_close(ours, eager)


@each_trained
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_autocast(op: Op, as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it casts no norm. On a GPU it casts to fp32 what is no fp64, which it leaves whole: here by the function that asks."""
    monkeypatch.setattr(arguments, "autocasts_to_fp32", lambda _: as_on_a_gpu)
    for mix in some_mixes(op):
        call, given = call_of(op, tensors_of(mix))
        cast = [t if not as_on_a_gpu or t.dtype is torch.float64 else t.float() for t in given]
        with torch.autocast("cpu", torch.bfloat16):
            leaves = [tensor.clone().requires_grad_() for tensor in given]
            y = call(*leaves)
        y.sum().backward()
        assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [tensor.dtype for tensor in given]
        monkeypatch.undo()
        torch.testing.assert_close(y, call(*cast))
        monkeypatch.setattr(arguments, "autocasts_to_fp32", lambda _: as_on_a_gpu)


@pytest.mark.parametrize("classes", [(nn.LayerNorm, FusedLayerNorm), (nn.RMSNorm, FusedRMSNorm)], ids=["layer", "rms"])
def test_modules_and_fuse(classes: tuple[Any, Any]) -> None:
    """A fused model takes every mix; where its eager self takes it too, they agree."""
    agreed = 0
    for dtype in DTYPES:
        for parameters in DTYPES:
            x, norm = torch.randn(3, N).to(dtype), classes[0](N).to(parameters)
            model = nn.Sequential(norm, nn.Identity())
            fused = copy.deepcopy(model)
            fuse(fused)
            assert repr(fused[0]).startswith(classes[1].__name__)
            y = fused(x)
            assert y.dtype is dtype
            y.sum().backward()
            assert all(p.grad is not None and p.grad.dtype is parameters for p in fused.parameters())
            try:
                expected = model(x)
            except RuntimeError:  # ATen's refusal
                continue
            agreed += 1
            torch.testing.assert_close(y, expected)
    assert agreed >= 4
