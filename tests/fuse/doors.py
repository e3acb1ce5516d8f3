"""What the tests of fuse's promises share: small modules, a model beside its fused copy, and comparisons of any call of the two."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_ops import FuseReport, fuse
from tests.fuse.models import HEADS, INNER, MODELS, WIDTH, Made

Call = Callable[[nn.Module], Any]
NORMS = ("layer_norm", "rms_norm", "softmax")


class Mlp(nn.Module):
    """An MLP block whose activation is a module; square, so that its layers may be replaced by an Identity."""

    def __init__(self, dim: int = 4, hidden: int = 4, act: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(self.norm(x)))))


class FunctionMlp(nn.Module):
    """An MLP block that holds its activation as a function, and calls another by its name."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.act = F.gelu
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.fc2(self.act(self.fc1(x))))


class GatedMlp(nn.Module):
    """Llama's MLP, square."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, dim, bias=False)
        self.down = nn.Linear(dim, dim, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class LoRA(nn.Module):
    """Takes the place of a linear layer and adds a low-rank product to it, as PEFT does."""

    def __init__(self, base: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(torch.linspace(-1, 1, 2 * width).reshape(2, width).to(base.weight.dtype))
        self.up = nn.Parameter(torch.linspace(1, -1, 2 * out).reshape(out, 2).to(base.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.down), self.up)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


def x4(*shape: int) -> torch.Tensor:
    shape = shape or (3,)
    count = 4 * torch.Size(shape).numel()
    return torch.linspace(-2, 2, count, dtype=torch.float64).sin().mul(2).reshape(*shape, 4)


class Everything(nn.Module):
    """Something of every kind that fuse knows, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.function = FunctionMlp()
        self.gated = GatedMlp()
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Softmax(dim=-1))
        self.head = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * F.silu(self.head(self.seq(self.gated(self.function(self.mlp(x))))))


def everything() -> Everything:
    torch.manual_seed(1)
    return Everything().double()


def call(m: nn.Module) -> torch.Tensor:
    return m(x4())


def mlp(_: int) -> Made:
    return Mlp(), {"x": x4()}


def function_mlp(_: int) -> Made:
    return FunctionMlp(), {"x": x4()}


def gated_mlp(_: int) -> Made:
    return GatedMlp(), {"x": x4()}


def sequential(_: int) -> Made:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)), {"input": x4()}


def _wide(length: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * length * WIDTH).reshape(2, length, WIDTH)


def encoder_layer(_: int) -> Made:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, activation="gelu", batch_first=True), {"src": _wide(5)}


def decoder_layer(_: int) -> Made:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, batch_first=True)
    return layer, {"tgt": _wide(3), "memory": _wide(5)}


TRANSFORMERS = ("bert", "gpt2", "vit", "llama", "t5", "t5_gated")
OWN = (mlp, function_mlp, gated_mlp, sequential, encoder_layer, decoder_layer)
MADE = {name: MODELS[name] for name in TRANSFORMERS} | {f.__name__: f for f in OWN}


@functools.lru_cache
def _built(name: str) -> Made:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, arguments = MADE[name](1)
    return model.double().eval(), {k: t.double() if t.is_floating_point() else t for k, t in arguments.items()}


def built(name: str) -> Made:
    """(model, its arguments): one layer in fp64, where rounding hides no other difference; evaluation mode; a copy of its own."""
    model, arguments = _built(name)
    return copy.deepcopy(model), dict(arguments)


def fused_copy(model: nn.Module, **options: Any) -> nn.Module:
    """A fused deep copy, in which at least one linear layer is fused with what follows."""
    fused = copy.deepcopy(model)
    assert_fuses_linears(fuse(fused, **options))
    return fused


def assert_fuses_linears(report: FuseReport) -> None:
    assert [c for c in report.fused if c.op not in NORMS], report.table()


def pair(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """(model, its fused copy, arguments) by a name of MADE."""
    model, arguments = built(name)
    return model, fused_copy(model), arguments


def tensors(output: Any) -> list[torch.Tensor]:
    """The float tensors of what a call returned, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return [t for value in values for t in tensors(value)]


def outcome(model: nn.Module, call: Call, backward: bool = True) -> list[tuple[str, torch.Tensor | None]]:
    """What one call gives: its tensors and, where one needs a gradient, the gradients of all parameters, by name."""
    model.zero_grad()
    torch.manual_seed(7)  # the same dropout every time
    outputs = tensors(call(model))
    assert outputs, "the call gave no tensor"
    found: list[tuple[str, torch.Tensor | None]] = [(f"output {i}", t.detach()) for i, t in enumerate(outputs)]
    if backward and any(t.requires_grad for t in outputs):
        sum(t.square().sum() for t in outputs if t.requires_grad).backward()
        found += [(name, p.grad) for name, p in model.named_parameters()]
    return found


def assert_outcomes(got: list, expected: list, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    assert [name for name, _ in got] == [name for name, _ in expected]
    for (name, a), (_, b) in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same(model: nn.Module, fused: nn.Module, call: Call, modes: tuple[bool, ...] = (False, True)) -> None:
    """call gives the same tensors and gradients with both, in evaluation and in training."""
    for training in modes:
        model.train(training)
        fused.train(training)
        assert_outcomes(outcome(fused, call), outcome(model, call))


def on(arguments: dict[str, Any]) -> Call:
    return lambda model: model(**arguments)


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """(name, module, an input of it) for each linear layer, activation, norm and dropout of a model."""
    for name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Conv2d) and "Embedding" not in type(module).__name__:
            weight = getattr(module, "weight", None)
            last = 4 if weight is None else module.in_features if isinstance(module, nn.Linear) else weight.shape[0]
            yield name, module, torch.linspace(-2, 2, 3 * last, dtype=torch.float64).reshape(3, last)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ or isinstance(module, nn.Softmax)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_linear(module)]


def activations(model: nn.Module) -> list[str]:
    """The names of the modules that are activations."""
    homes = ("torch.nn.modules.activation", "transformers.activations")
    kinds = (nn.MultiheadAttention, nn.Softmax)
    return [name for name, m in model.named_modules() if type(m).__module__ in homes and not isinstance(m, kinds)]


def put(model: nn.Module, name: str, value: Any) -> None:
    """Sets the attribute of a submodule by its dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, value)


def _detached(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(v) for v in value)
    return value.detach() if isinstance(value, torch.Tensor) else value


def inputs_of(model: nn.Module, call: Call) -> dict[str, tuple[tuple, dict]]:
    """What each submodule was called with last, by name: enough to call it alone."""
    seen: dict[str, tuple[tuple, dict]] = {}

    def keep(name: str, args: tuple, kwargs: dict) -> None:
        seen[name] = _detached(args), {k: _detached(v) for k, v in kwargs.items()}

    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, kwargs, name=name: keep(name, args, kwargs), with_kwargs=True)
    call(model)
    return seen


def state(model: nn.Module) -> list[tuple[str, type, dict[str, int]]]:
    """Each module's class and what its __dict__ holds, by identity; its registries are looked into."""
    inner = ("_parameters", "_buffers", "_modules")
    return [
        (
            name,
            type(module),
            {k: id(v) for k, v in module.__dict__.items() if k not in inner}
            | {f"{registry}.{k}": id(v) for registry in inner for k, v in module.__dict__[registry].items()},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def quiet_fuse(model: nn.Module, **options: Any) -> FuseReport:
    """fuse, also where nothing may be left to fuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fuse(model, **options)


class Counter:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, inner: str = "eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inner = inner

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.inner)(graph, inputs)
