"""A fused model in other tools' hands: quantisation, tracing, nested tensors, LoRA, tensor subclasses, DDP, pruning, meta devices."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fused_ops import fuse, unfuse
from tests.fuse.doors import (
    MADE,
    FunctionMlp,
    GatedMlp,
    LoRA,
    Mlp,
    assert_outcomes,
    assert_same,
    built,
    call,
    everything,
    fused_copy,
    is_linear,
    linears,
    on,
    outcome,
    pair,
    put,
    quiet_fuse,
    tensors,
    x4,
)
from tests.fuse.models import TimmBlock

pytestmark = pytest.mark.filterwarnings("ignore")


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 4))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "function": FunctionMlp,
    "gated": GatedMlp,
    "sequential": chain,
    "block": lambda: TimmBlock(4, 2, 8),
    "everything": everything,
}
small = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)


def both(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    return model, fused_copy(model)


def x_for(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return x4(2, 3).to(dtype)


@pytest.mark.parametrize("name", [n for n in MADE if n != "encoder_layer"])  # torch's fast path cannot read quantised weights
def test_quantize_dynamic_takes_every_linear(name: str):
    model, arguments = built(name)
    model.float()
    arguments = {k: t.float() if t.is_floating_point() else t for k, t in arguments.items()}
    fused = fused_copy(model)
    quantized, fused = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8) for m in (model, fused))

    def taken(m: nn.Module) -> list[str]:
        return [n for n, part in m.named_modules() if isinstance(part, torch.ao.nn.quantized.dynamic.Linear)]

    assert taken(fused) == taken(quantized)
    assert name == "gpt2" or taken(quantized)
    with torch.no_grad():
        assert_outcomes(outcome(fused, on(arguments)), outcome(quantized, on(arguments)), rtol=1e-4, atol=1e-4)


@small
def test_fx_traces_a_fused_model(make: Callable[[], nn.Module]):
    model, fused = both(make)
    traced = torch.fx.symbolic_trace(fused)
    x = x_for()
    torch.testing.assert_close(traced(x), model(x))
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    expected = {node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"}
    assert called == expected, "the tracer sees the same leaf modules"


@small
def test_jit_script_and_trace(make: Callable[[], nn.Module]):
    model, fused = both(make)
    x = x_for()
    torch.testing.assert_close(torch.jit.trace(fused, x)(x), model(x))
    if make not in (
        FunctionMlp,
        everything,
    ):  # torch cannot script a function held as an attribute that it has to find a type for
        torch.testing.assert_close(torch.jit.script(fused)(x), model(x))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("name", ["mlp", "function", "gated", "sequential"])
def test_nested_tensors(name: str, layout: torch.layout):
    model, fused = both(SMALL[name], torch.float32)
    x = torch.nested.nested_tensor([x4(2).float(), x4(5).float(), x4(3).float()], layout=layout)
    if layout is torch.strided:
        torch.set_grad_enabled(False)
    try:
        for a, b in zip(fused(x).unbind(), model(x).unbind(), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch.set_grad_enabled(True)


def _width_and_out(linear: nn.Module) -> tuple[int, int]:
    width, out = linear.weight.shape if not isinstance(linear, nn.Linear) else linear.weight.shape[::-1]
    return int(width), int(out)


@pytest.mark.parametrize("name", [n for n in MADE if not n.endswith("coder_layer")])
@pytest.mark.parametrize("every", [True, False], ids=["all linears", "the last linears"])
def test_lora_after_fuse(name: str, every: bool):
    """As PEFT adds it: each linear layer is replaced by one that holds it; then merged and taken out again."""
    model, fused, arguments = pair(name)
    names = linears(model) if every else linears(model)[-1:]
    for m in (model, fused):
        m.requires_grad_(False)
        for part in names:
            put(m, part, LoRA(m.get_submodule(part), *_width_and_out(m.get_submodule(part))))
    assert_same(model, fused, on(arguments))
    for m in (model, fused):
        m.requires_grad_(True)
        for part in names:
            put(m, part, m.get_submodule(part).base_layer)
    assert_same(model, fused, on(arguments))
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]


class Scaled(torch.Tensor):
    """A weight as quantisation libraries make it: it knows linear, addmm, mm, t, detach and nothing else."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], meta: None, size: Any, stride: Any) -> Scaled:
        return cls(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        if function in (aten.t.default, aten.detach.default, aten.alias.default):
            return cls(function(args[0].values))
        if function in (aten.linear.default, aten.addmm.default, aten.mm.default):
            scaled = pytree.tree_map_only(cls, lambda t: t.values * 2, args)
            return function(*scaled, **(kwargs or {}))
        raise NotImplementedError(f"Scaled does not know {function}")


class ScaledByFunction(Scaled):
    """The same, but linear is taken at the level of torch functions, as torchao does."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear:
            input, weight, *bias = args
            return F.linear(input, weight.values * 2, *bias, **(kwargs or {}))
        return super().__torch_function__(function, kinds, args, kwargs or {})


@pytest.mark.parametrize("cls", [Scaled, ScaledByFunction], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", [n for n in MADE if n not in ("gpt2", "encoder_layer", "decoder_layer")])
def test_weights_of_a_tensor_subclass(name: str, cls: type[Scaled]):
    model, fused, arguments = pair(name)
    for m in (model, fused):
        for part in m.modules():
            if type(part) is nn.Linear:
                part.weight = nn.Parameter(cls(part.weight.detach()), requires_grad=False)
    assert_same(model, fused, lambda m: [t.detach() for t in tensors(m(**arguments))], modes=(False,))
    quiet_fuse(fused)
    assert_same(model, fused, lambda m: [t.detach() for t in tensors(m(**arguments))], modes=(True,))


class Logged(torch.Tensor):
    """An input that writes down what is done to it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, kinds, args, kwargs or {})


@small
def test_an_input_of_a_tensor_subclass(make: Callable[[], nn.Module]):
    model, fused = both(make)
    results = []
    for m in (model, fused):
        Logged.seen.clear()
        out = m(x_for().as_subclass(Logged))
        assert type(out) is Logged
        results.append((out.as_subclass(torch.Tensor), [name for name in Logged.seen if not name.startswith("__")]))
    torch.testing.assert_close(results[1][0], results[0][0])
    if make is not everything and make is not SMALL["block"]:
        assert {"linear"} <= set(results[0][1])
        assert results[1][1].count("linear") == results[0][1].count("linear")


@small
def test_export(make: Callable[[], nn.Module]):
    model, fused = both(make)
    x = x_for()
    dynamic = {0: torch.export.Dim.AUTO}
    program = torch.export.export(fused, (x,), dynamic_shapes=(dynamic,))
    assert set(program.state_dict) == set(model.state_dict())
    torch.testing.assert_close(program.module()(x), model(x))
    more = torch.cat([x, x + 1])
    torch.testing.assert_close(program.module()(more), model(more))


@small
def test_function_transforms(make: Callable[[], nn.Module]):
    model, fused = both(make)
    x = x4(2, 1, 3)  # the transformed dimension comes first
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(m: nn.Module) -> Callable:
        return lambda p, x: torch.func.functional_call(m, p, (x,)).square().sum()

    results = [
        (
            torch.func.vmap(m)(x),
            torch.func.grad(loss(m))(parameters, x[0]),
            torch.func.vmap(torch.func.grad(loss(m)), in_dims=(None, 0))(parameters, x),
            torch.func.jvp(m, (x[0],), (x[0].cos(),)),
            torch.func.jacrev(m)(x[0]),
        )
        for m in (fused, model)
    ]
    for a, b in zip(*(pytree.tree_leaves(r) for r in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@small
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing(make: Callable[[], nn.Module], reentrant: bool):
    model, fused = both(make)
    x = x_for().requires_grad_()
    assert_outcomes(
        outcome(fused.train(), lambda m: checkpoint(m, x, use_reentrant=reentrant)), outcome(model.train(), lambda m: m(x))
    )


def test_checkpointing_of_transformers():
    for name in ("llama", "bert", "gpt2"):
        model, fused, arguments = pair(name)
        model.train()
        fused.train().gradient_checkpointing_enable()
        assert_outcomes(outcome(fused, on(arguments)), outcome(model, on(arguments)))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@small
def test_ddp_on_one_process(make: Callable[[], nn.Module], one_process: None):
    model, fused = both(make)
    x = x_for()
    parallel = nn.parallel.DistributedDataParallel(fused)
    got = outcome(parallel, lambda m: m(x))
    assert_outcomes([(name.removeprefix("module."), t) for name, t in got], outcome(model, lambda m: m(x)))
    late = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    fuse(late)
    assert_outcomes([(n.removeprefix("module."), t) for n, t in outcome(late, lambda m: m(x))], outcome(model, lambda m: m(x)))


@pytest.mark.parametrize("name", [n for n in MADE if not n.endswith("coder_layer")])
def test_pruning(name: str):
    model, fused, arguments = pair(name)
    for m in (model, fused):
        for part in m.modules():
            if is_linear(part):
                prune.l1_unstructured(part, "weight", amount=0.5)
    assert_same(model, fused, on(arguments))
    for m in (model, fused):
        for part in m.modules():
            if is_linear(part):
                prune.remove(part, "weight")
    assert_same(model, fused, on(arguments))


@small
def test_assigned_and_swapped_weights(make: Callable[[], nn.Module]):
    model, fused = both(make)
    values = {k: torch.sin(torch.arange(t.numel(), dtype=t.dtype)).reshape(t.shape) for k, t in model.state_dict().items()}
    for m in (model, fused):
        m.load_state_dict(values, assign=True)
    x = x_for()
    assert_same(model, fused, lambda m: m(x))
    future = torch.__future__
    before = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(True)
    try:
        for m in (model, fused):
            m.float().load_state_dict({k: v.cos() for k, v in values.items()})
            m.double()
        assert_same(model, fused, lambda m: m(x))
    finally:
        future.set_swap_module_params_on_conversion(before)


@small
@pytest.mark.parametrize("when", ["fused on meta", "fused, then to meta"])
def test_meta_then_assigned(make: Callable[[], nn.Module], when: str):
    torch.manual_seed(0)
    model = make().double().eval()
    fused = copy.deepcopy(model)
    if when == "fused on meta":
        fused.to("meta")
    fuse(fused)
    fused.to("meta")
    x = x_for()
    assert fused(x.to("meta")).shape == model(x).shape
    fused.to_empty(device="cpu")
    fused.load_state_dict(model.state_dict())
    assert_same(model, fused, lambda m: m(x))
    fused.to("meta").load_state_dict(model.state_dict(), assign=True)
    assert_same(model, fused, lambda m: m(x))


@small
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16], ids=str)
def test_half_and_autocast(make: Callable[[], nn.Module], dtype: torch.dtype):
    model, fused = both(make, torch.float32)
    x = x_for(torch.float32)
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    for training in (False, True):
        results = []
        for m in (fused, model):
            m.train(training)
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype):
                results.append(m(x))
        assert results[0].dtype == results[1].dtype
        torch.testing.assert_close(*results, **tolerance)
    model.eval().to(dtype)
    fused.eval().to(dtype)
    got, expected = fused(x.to(dtype)), model(x.to(dtype))
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, **tolerance)


def test_names_that_tools_go_by():
    """str(model) names every Linear and activation as before; tools find modules by class name and by isinstance."""
    model, fused = both(everything)
    for (name, a), (other, b) in zip(model.named_modules(), fused.named_modules(), strict=True):
        assert name == other
        if is_linear(a) or isinstance(a, (nn.GELU, nn.ReLU, nn.SiLU)):
            assert repr(a) == repr(b)
    assert [n for n, m in fused.named_modules() if m.__class__.__name__ == "Mlp"] == ["mlp"]
    assert isinstance(fused.mlp.forward, types.MethodType)
    assert outcome(fused, call)
