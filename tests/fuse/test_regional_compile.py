"""Each layer compiled by itself, as large models are: the fused model needs as many graphs as the unfused one, and no recompile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from fused_ops import fuse
from tests.fuse.doors import Counter, FunctionMlp, GatedMlp, Mlp, assert_fuses_linears, assert_outcomes, on, outcome, x4
from tests.fuse.models import MODELS, Made

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = 12
HOME = {"llama": "layers", "bert": "encoder.layer", "gpt2": "transformer.h"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def made(name: str) -> Made:
    torch.manual_seed(0)
    model, arguments = MODELS[name](LAYERS)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled dropout draws other numbers
    return model, arguments


def compile_each(model: nn.Module, home: str, how: str, backend: Counter) -> None:
    layers = model.get_submodule(home)
    for i, layer in enumerate(layers):
        if how == "layer.compile()":
            layer.compile(fullgraph=True, backend=backend)
        else:
            layers[i] = torch.compile(layer, fullgraph=True, backend=backend)


def graphs(model: nn.Module, name: str, how: str, call: Callable, training: bool) -> tuple[int, int]:
    """(graphs, frames) of compiling each layer of a copy; its result is the uncompiled model's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.train(training)
    with torch.set_grad_enabled(training):
        expected = outcome(model, call)
    model = copy.deepcopy(model)
    backend = Counter("aot_eager" if training and name == "gpt2" else "eager")
    compile_each(model, HOME[name], how, backend)
    with torch.set_grad_enabled(training):
        for _ in range(2):
            got = outcome(model, call)
            assert_outcomes([(n.replace("_orig_mod.", ""), t) for n, t in got], expected, rtol=1e-3, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    return len(backend.graphs), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@functools.lru_cache
def unfused_graphs(name: str, training: bool) -> tuple[int, int]:
    model, arguments = made(name)
    return graphs(model, name, "layer.compile()", on(arguments), training)


@pytest.mark.parametrize(
    ("how", "training"),
    [
        pytest.param("layer.compile()", False, marks=pytest.mark.slow, id="compile, inference"),
        pytest.param("torch.compile(layer)", False, id="torch.compile, inference"),
        pytest.param("layer.compile()", True, id="compile, training"),
    ],
)
@pytest.mark.parametrize("name", HOME)
def test_as_many_graphs_as_unfused(name: str, how: str, training: bool):
    model, arguments = made(name)
    unfused = unfused_graphs(name, training)
    assert unfused[0] < LAYERS, "the unfused layers do not share a graph, so this model shows nothing"
    model.train(training)
    assert_fuses_linears(fuse(model))
    with torch._dynamo.config.patch(error_on_recompile=unfused[0] == 1):
        assert graphs(model, name, how, on(arguments), training) == unfused


class Structures(nn.Module):
    """Blocks of three structures, four of each: a gated MLP, an MLP with its activation as a function, and a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (GatedMlp, FunctionMlp, lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.LayerNorm(4)))
        self.layers = nn.ModuleList([kind() for _ in range(4) for kind in kinds])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_one_graph_a_structure_also_in_copies():
    model = Structures().eval()
    fuse(model)
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    backend = Counter()
    with torch.no_grad():
        expected = model(x)
        for m in (model, copy.deepcopy(model)):
            for i, layer in enumerate(m.layers):
                m.layers[i] = torch.compile(layer, fullgraph=True, backend=backend)
            torch.testing.assert_close(m(x), expected)
    assert len(backend.graphs) == 3


def test_compiled_layers_see_what_changes():
    """A replaced activation, linear or forward after compiling is a recompile, never the old numbers."""
    model = Mlp().double().eval()
    fused = copy.deepcopy(model)
    fuse(fused)
    for m in (model, fused):
        m.compile(backend="eager", fullgraph=True)
    changes: list[Callable[[nn.Module], None]] = [
        lambda m: None,
        lambda m: setattr(m, "act", nn.Tanh()),
        lambda m: setattr(m, "act", nn.GELU(approximate="tanh")),
        lambda m: setattr(m, "fc1", nn.Sequential(m.fc1, nn.ReLU())),
        lambda m: setattr(m.fc2, "bias", None),
        lambda m: setattr(m.fc2, "weight", nn.Parameter(m.fc2.weight.detach() * 2)),
    ]
    for change in changes:
        for m in (model, fused):
            change(m)
        torch.testing.assert_close(fused(x4()), model(x4()))
