"""torch.fx.symbolic_trace: a graph holds the public functions as they are called, and other passes can rewrite it."""

import copy
import operator
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_ops import REGISTRY, fused_layernorm, fused_linear, fused_rmsnorm, fused_softmax
from fused_ops.nn import FusedLayerNorm, FusedLinear, FusedRMSNorm, FusedSoftmax
from fused_ops.testing import Op, Sample
from tests.torch.calls import raw_operators


def functions(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def _call(op: Op, sample: Sample, positions: list[int]) -> Any:
    """The sample's call as a function of the tensors at these positions, given as one sequence."""

    def call(given: Any) -> Any:
        args = list(sample.args)
        for i, position in enumerate(positions):
            args[position] = given[i]
        return op.public(*args, **sample.kwargs)

    return call


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items()])
def test_a_proxy_reaches_the_public_function(op: Op) -> None:
    """As any one of its tensors, and as all of them."""
    sample = op.example("cpu", torch.float32)
    tensors = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor)]
    expected = op.public(*sample.args, **sample.kwargs)
    assert tensors
    for positions in (*([i] for i in tensors), tensors):
        graph = fx.symbolic_trace(_call(op, sample, positions))
        assert functions(graph) == [operator.getitem] * len(positions) + [op.public]
        torch.testing.assert_close(graph([sample.args[i] for i in positions]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "layer_norm_fp8"])
def test_a_traced_shape(name: str) -> None:
    """normalized_shape is a proxy too: x.shape[-1:]."""
    op, x = REGISTRY[name], torch.randn(3, 8)
    graph = fx.symbolic_trace(lambda x: op.public(x, x.shape[-1:]))
    assert functions(graph)[-1] is op.public
    for ours, theirs in zip(graph(x), op.public(x, (8,))):
        assert torch.equal(ours, theirs)


class Model(nn.Module):
    """One of each module of fused_ops.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = FusedLayerNorm(4), FusedRMSNorm(6)
        self.up, self.down = FusedLinear(4, 6, activation="gelu"), FusedLinear(6, 2)
        self.softmax = FusedSoftmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.down(self.rms(self.up(self.norm(x)))))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_modules(model: Model) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    graph = fx.symbolic_trace(model)
    assert functions(graph) == [fused_layernorm, fused_linear, fused_rmsnorm, fused_linear, fused_softmax]
    assert set(graph.state_dict()) == set(model.state_dict())
    expected = model(x)
    named = dict(model.named_parameters())
    wanted = torch.autograd.grad(expected[:, 0].sum(), [x, *named.values()])
    for other in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), fx.symbolic_trace(graph)):
        got = other(x)
        assert torch.equal(got, expected)
        leaves = [x, *(dict(other.named_parameters())[name] for name in named)]
        for ours, theirs in zip(torch.autograd.grad(got[:, 0].sum(), leaves), wanted):
            assert torch.equal(ours, theirs)
    assert torch.equal(fx.Interpreter(graph).run(x), expected)


def test_the_graph_can_be_scripted_traced_compiled_and_exported(model: Model) -> None:
    x = torch.randn(3, 4)
    graph, expected = fx.symbolic_trace(model), model(x)
    torch.testing.assert_close(torch.jit.script(graph)(x), expected)
    torch.testing.assert_close(torch.jit.trace(graph, (x,))(x), expected)
    assert torch.equal(torch.compile(graph, backend="aot_eager", fullgraph=True)(x), expected)
    exported = torch.export.export(graph, (x,)).module()
    assert raw_operators(exported) == {
        f"fused_ops.{name}_fwd.default" for name in ("layer_norm", "rms_norm", "linear", "softmax")
    }
    assert torch.equal(exported(x), expected)


def test_patterns_are_replaced(model: Model) -> None:
    def pattern(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear(x, weight, bias, "gelu")

    def replacement(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.linear(x, weight, bias))

    graph = fx.symbolic_trace(model)
    assert len(fx.replace_pattern(graph, pattern, replacement)) == 1
    assert functions(graph) == [fused_layernorm, F.linear, F.relu, fused_rmsnorm, fused_linear, fused_softmax]
    x = torch.randn(3, 4)
    model.up.activation = "relu"
    torch.testing.assert_close(graph(x), model(x))


def test_a_softmax_without_dim_is_traced() -> None:
    graph = fx.symbolic_trace(FusedSoftmax())
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        assert torch.equal(graph(x), x.softmax(1))
