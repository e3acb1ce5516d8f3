"""Unmodified models, random weights: fused equals unfused in forward, gradients, torch.compile and torch.export."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops import REGISTRY, fuse, unfuse
from tests.fuse.models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore")

# What must be fused in each, no more and no less: {op: (fused, candidates)}. L layers each.
L = 2
EXPECTED = {
    "bert": {"layer_norm": (2 * L + 1, 2 * L + 1), "linear": (L + 1, 6 * L + 1), "softmax": (L, L)},  # and a pooler
    "distilbert": {
        "layer_norm": (2 * L + 1, 2 * L + 1),
        "linear": (L, 6 * L),
        "mlp": (L, L),
        "softmax": (L, L),
    },
    "gpt2": {"layer_norm": (2 * L + 1, 2 * L + 1), "linear": (L, 4 * L + 1), "mlp": (L, L), "softmax": (2 * L, 2 * L)},
    "vit": {"layer_norm": (2 * L + 1, 2 * L + 1), "linear": (L + 1, 6 * L + 1), "mlp": (L, L), "softmax": (L, L)},
    "llama": {"rms_norm": (0, 2 * L + 1), "linear": (2 * L, 7 * L), "gated_linear": (L, L), "softmax": (L, L)},
    "t5": {"rms_norm": (0, 5 * L + 2), "linear": (2 * L, 16 * L), "softmax": (3 * L, 3 * L)},
    "t5_gated": {
        "rms_norm": (0, 5 * L + 2),
        "linear": (4 * L, 18 * L),
        "gated_linear": (2 * L, 2 * L),
        "softmax": (3 * L, 3 * L),
    },
    "clip_text": {"layer_norm": (2 * L + 1, 2 * L + 1), "linear": (L, 6 * L), "mlp": (L, L), "softmax": (L, L)},
    "clip_vision": {"layer_norm": (2 * L + 2, 2 * L + 2), "linear": (L, 6 * L), "mlp": (L, L), "softmax": (L, L)},
    "whisper_encoder": {"layer_norm": (2 * L + 1, 2 * L + 1), "linear": (L, 6 * L), "softmax": (L, L)},
    "torch_encoder": {"layer_norm": (2 * L + 1, 2 * L + 1), "linear": (L, 3 * L), "softmax": (0, L)},
    "timm_vit": {"layer_norm": (2 * L + 1, 2 * L + 1), "linear": (L, 4 * L), "softmax": (L, L)},
}


def tensors(output: Any) -> list[torch.Tensor]:
    """The float tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return [t for value in values for t in tensors(value)]


def made(name: str, layers: int = L) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """(a model, its fused copy, arguments), in evaluation mode and in fp64, where rounding hides no other difference."""
    torch.manual_seed(0)
    model, arguments = MODELS[name](layers)
    arguments = {k: t.double() if t.is_floating_point() else t for k, t in arguments.items()}
    model.double().eval()
    fused = copy.deepcopy(model)
    fuse(fused)
    return model, fused, arguments


def backward(model: nn.Module, arguments: dict[str, Any], call: Any = None) -> list[torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(5)  # the same dropout in both
    sum(t.square().sum() for t in tensors((model if call is None else call)(**arguments))).backward()
    return [p.grad for p in model.parameters()]


def assert_equal(got: Any, expected: Any) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # some forwards have fp32 inside


@pytest.mark.parametrize("name", MODELS)
def test_fuse(name: str):
    torch.manual_seed(0)
    model, _ = MODELS[name](L)
    types = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    report = fuse(model)
    assert {op: n for op, n in report.counts().items() if op in REGISTRY} == EXPECTED[name], report.table()
    assert all(c.detail for c in report.skipped)
    assert list(model.state_dict()) == keys
    unfuse(model)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str):
    model, fused, arguments = made(name)
    assert_equal(tensors(fused(**arguments)), tensors(model(**arguments)))
    with torch.no_grad():
        assert_equal(tensors(fused(**arguments)), tensors(model(**arguments)))


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str):
    model, fused, arguments = made(name, layers=1)
    for training in (False, True):
        model.train(training)
        fused.train(training)
        assert_equal(backward(fused, arguments), backward(model, arguments))


LIKE_ANOTHER = {"t5", "distilbert", "clip_vision"}  # compiled as t5_gated, bert and clip_text are: tried by `make slow`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_ANOTHER else name for name in MODELS]
)
def test_compile(name: str):
    model, fused, arguments = made(name, layers=1)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    assert_equal(backward(fused, arguments, compiled), backward(model, arguments))
    assert len(graphs) == 1
    assert "autograd_function_apply" in graphs[0].code, "no fused op in the graph"


@pytest.mark.parametrize("name", MODELS)
def test_export(name: str):
    model, fused, arguments = made(name, layers=1)
    expected = tensors(model(**arguments))
    with torch.no_grad():
        program = torch.export.export(fused, (), arguments)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(o.startswith("fused_ops.") and "linear_fwd" in o for o in operators), operators
    assert_equal(tensors(program.module()(**arguments)), expected)
