"""torch.compile, torch.export and AOTInductor: one graph, equal to eager, forward and backward."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_ops import REGISTRY, compile_with_aten
from fused_ops._torch.compile import COMPILE_WITH_ATEN
from fused_ops.nn import FusedLayerNorm, FusedLinear, FusedSoftmax
from fused_ops.testing import decompositions
from tests import process
from tests.torch.calls import CALLS, Call, each_call, raw_operators


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    compile_with_aten(enabled=None)
    torch._dynamo.reset()


class Counting:
    """A backend that counts the graphs Dynamo hands over, and keeps their operators."""

    def __init__(self, inner: str = "aot_eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.compile = torch._dynamo.lookup_backend(inner)

    def __call__(self, graph: torch.fx.GraphModule, example: Any, **kwargs: Any) -> Any:
        self.graphs.append(graph)
        return self.compile(graph, example, **kwargs)


def block() -> nn.Module:
    return nn.Sequential(FusedLayerNorm(8), FusedLinear(8, 16, activation="gelu"), FusedLinear(16, 8), FusedSoftmax(-1))


def gradients(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@each_call
def test_no_graph_break(call: Call) -> None:
    report = torch._dynamo.explain(call.ours)(*call.tensors(requires_grad=True))
    assert report.graph_break_count == 0
    assert report.graph_count == 1


@each_call
def test_one_graph_over_batch_sizes_forward_and_backward(call: Call) -> None:
    backend = Counting()
    compiled = torch.compile(call.ours, fullgraph=True, backend=backend)
    for batch in (2, 3, 5, 7, 16):
        tensors = call.tensors(batch=batch)
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch._dynamo.mark_dynamic(leaves[0], 0)
        out = compiled(*leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        for got, expected in zip((out, *grads), gradients(call.ours, tensors)):
            torch.testing.assert_close(got, expected)
    assert len(backend.graphs) == 1


@each_call
def test_the_compiled_backward_is_our_operator(call: Call) -> None:
    """Not the differentiable formula in ATen, which a gradient for a hidden output would call up."""
    from torch._dynamo.backends.common import aot_autograd

    seen: list[set[str]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(raw_operators(graph))
        return graph.forward

    compiled = torch.compile(call.ours, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(*call.tensors(requires_grad=True)).sum().backward()
    forward, backward = seen
    assert forward == {str(call.op.fwd)}
    assert str(call.op.bwd) in backward
    assert backward <= {str(op.bwd) for op in REGISTRY.values() if op.trains}  # an MLP's first layer is a linear


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@each_call
def test_without_gradients(call: Call, context: Any) -> None:
    tensors = call.tensors(requires_grad=True)
    compiled = torch.compile(call.ours, fullgraph=True, backend="aot_eager")
    with context():
        out = compiled(*tensors)
        torch.testing.assert_close(out, call.ours(*tensors))
    assert not out.requires_grad


@pytest.mark.slow
@each_call
def test_inductor_gives_eagers_gradients(call: Call) -> None:
    tensors = call.tensors()
    for got, expected in zip(gradients(torch.compile(call.ours, fullgraph=True), tensors), gradients(call.ours, tensors)):
        torch.testing.assert_close(got, expected)


def test_inductor_trains_like_eager() -> None:
    """One model of several modules, compiled by Inductor, three steps of training."""
    torch.manual_seed(0)
    eager = block()
    compiled_model = block()
    compiled_model.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_model, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (eager, compiled_model)]
    for step in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((eager, compiled), optimizers):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(eager.named_parameters(), compiled_model.parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_reduce_overhead_mode() -> None:
    """CUDA graphs on a GPU; on the CPU the mode is accepted and does nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = block().to(device).eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(device)
            torch.testing.assert_close(compiled(x), model(x))


@each_call
def test_aten_when_compiling_is_a_switch_for_each_op(call: Call) -> None:
    tensors = call.tensors()
    backend = Counting()
    compiled = torch.compile(lambda *t: call.ours(*t), fullgraph=True, backend=backend)
    expected = call.ours(*tensors)
    for enabled, operators in ((False, {f"fused_ops.{call.name}_fwd.default"}), (True, set()), (False, None)):
        compile_with_aten(call.name, enabled=enabled)
        torch.testing.assert_close(compiled(*tensors), expected)
        if operators is not None:
            assert raw_operators(backend.graphs[-1]) == operators
    assert len(backend.graphs) == 2  # the third call finds the first graph again
    other = next(c for c in CALLS if c.name != call.name)
    compile_with_aten(call.name)
    torch.compile(other.ours, fullgraph=True, backend=backend)(*other.tensors())
    assert raw_operators(backend.graphs[-1]) == {f"fused_ops.{other.name}_fwd.default"}


def test_the_switch_refuses_unknown_names_and_reads_the_environment() -> None:
    with pytest.raises(ValueError, match=r"compile_with_aten: ops: got 'layernorm', allowed: .*'layer_norm'"):
        compile_with_aten("layernorm")
    code = "import fused_ops._torch.compile as c; print(sorted(k for k, on in c.COMPILE_WITH_ATEN.items() if on))"
    for value, expected in (("softmax, linear", ["linear", "softmax"]), ("all", sorted(COMPILE_WITH_ATEN)), ("", [])):
        env = os.environ | {"FUSED_OPS_COMPILE_WITH_ATEN": value}
        assert process.output(code, env=env).strip() == str(expected)


@pytest.mark.parametrize("strict", [False, True])
@each_call
def test_export_keeps_the_operator_and_decomposes_to_aten(call: Call, strict: bool) -> None:
    class Model(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return call.ours(*tensors)

    tensors = tuple(call.tensors())
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"tensors": tuple({0: batch} if i == 0 else None for i in range(len(tensors)))}
    program = torch.export.export(Model(), tensors, dynamic_shapes=shapes, strict=strict)
    assert raw_operators(program.graph_module) == {f"fused_ops.{call.name}_fwd.default"}
    lowered = program.run_decompositions(decompositions())
    assert raw_operators(lowered.graph_module) == set()
    for size in (2, 9):
        inputs = call.tensors(batch=size)
        for exported in (program, lowered):
            torch.testing.assert_close(exported.module()(*inputs), call.ours(*inputs))


@pytest.mark.slow
def test_aotinductor_package_needs_no_fused_ops(tmp_path: Path) -> None:
    model = block().eval()
    x = torch.randn(4, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).run_decompositions(decompositions())
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    other = torch.randn(9, 8)
    torch.save({"x": other, "y": model(other).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        f"case = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"out = torch._inductor.aoti_load_package({path!r})(case['x'])\n"
        "torch.testing.assert_close(out, case['y'])\n"
        "assert not any(name.startswith('fused_ops') for name in sys.modules)\n"
    )
    process.output(code, cwd=tmp_path)
