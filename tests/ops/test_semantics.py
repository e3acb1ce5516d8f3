"""Where torch.nn.functional defines a behaviour, ours is the same: compared sample by sample, and case by case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_ops import REGISTRY, fused_layernorm, fused_linear, fused_softmax
from tests.contract import TRAINED, cases, sample_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize(("name", "dtype", "index"), cases(DTYPES))
def test_equals_torch(name: str, dtype: torch.dtype, index: int) -> None:
    spec, sample = sample_of(name, dtype, index)
    ours, theirs = spec.public(*sample.args, **sample.kwargs), spec.torch_fn(*sample.args, **sample.kwargs)
    assert ours.dtype is theirs.dtype
    assert ours.is_contiguous()
    half = not {dtype, ours.dtype}.isdisjoint((torch.float16, torch.bfloat16))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if half else {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


def test_softmax_of_a_scalar() -> None:
    assert fused_softmax(torch.tensor(3.0), 0).item() == 1.0
    assert fused_softmax(torch.tensor(float("inf")), -1).isnan()
    with pytest.raises(IndexError, match="allowed: a number from -1 to 0"):
        fused_softmax(torch.tensor(3.0), 1)


@pytest.mark.parametrize("name", list(TRAINED))
def test_meta_tensors(name: str) -> None:
    """Shapes without data, as accelerate and FLOP counters use them; torch has no autocast for the meta device."""
    spec = REGISTRY[name]
    sample = spec.example("cpu", torch.float32)
    args = [a.to("meta").requires_grad_() if isinstance(a, torch.Tensor) else a for a in sample.args]
    out = spec.public(*args, **sample.kwargs)
    assert out.is_meta
    assert out.shape == spec.torch_fn(*sample.args, **sample.kwargs).shape
    out.sum().backward()
    assert all(a.grad is not None and a.grad.shape == a.shape for a in args if isinstance(a, torch.Tensor))


def test_layernorm_takes_an_int() -> None:
    x = torch.randn(3, 4)
    torch.testing.assert_close(fused_layernorm(x, 4), F.layer_norm(x, (4,)))  # type: ignore[arg-type]


def test_empty_batches_have_zero_gradients() -> None:
    x = torch.randn(0, 4, requires_grad=True)
    w = torch.randn(5, 4, requires_grad=True)
    v = torch.randn(4, requires_grad=True)
    (fused_linear(x, w, None, "gelu").sum() + fused_layernorm(x, (4,), v).sum() + fused_softmax(x).sum()).backward()
    for leaf in (x, w, v):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("mode", ["trace", "script"])
def test_torchscript_holds_no_operator_of_ours(mode: str) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(5, 4))
            self.g = torch.nn.Parameter(torch.randn(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused_softmax(fused_layernorm(fused_linear(x, self.w, None, "gelu_tanh"), [5], self.g), -1)

    block, x = Block(), torch.randn(3, 4)
    module: Any = torch.jit.trace(block, (x,)) if mode == "trace" else torch.jit.script(block)
    assert "fused_ops::" not in str(module.inlined_graph)
    torch.testing.assert_close(module(x), block(x))


def test_fx_keeps_the_call_whole() -> None:
    """A Proxy goes through __torch_function__: the graph shows the public function, not its checks."""

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return fused_softmax(fused_layernorm(fused_linear(x, w), [5]))

    graph = torch.fx.symbolic_trace(Block())
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert targets == [fused_linear, fused_layernorm, fused_softmax]
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(graph(x, w), Block()(x, w))


@pytest.mark.parametrize("name", list(TRAINED))
def test_opcheck(name: str) -> None:
    """torch's own checks of the raw operators: schema, fake tensors, and compilation with static and dynamic shapes."""
    spec = REGISTRY[name]
    recorded: list[tuple[Any, Any]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (spec.fwd, spec.bwd):
                recorded.append((func, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    wanted = 0
    for sample in spec.samples("cpu", torch.float32):
        if wanted < 4 and "smooth" in sample.tags:
            wanted += 1
            args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in sample.args]
            with Recorder():
                spec.public(*args, **sample.kwargs).sum().backward()
    assert [func for func, _ in recorded].count(spec.fwd) == 4
    assert [func for func, _ in recorded].count(spec.bwd) >= 4  # a linear's, with an activation, runs twice
    for func, args in recorded:
        torch.library.opcheck(func, args)


def test_function_modes_see_the_public_function() -> None:
    """A TorchFunctionMode sees the public function, as with torch's own functions: under it a call does not take the fast path."""
    from torch.overrides import TorchFunctionMode

    seen: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with Watch():
        fused_softmax(fused_layernorm(fused_linear(x, w), [5]))
    assert seen == [fused_linear, fused_layernorm, fused_softmax]
