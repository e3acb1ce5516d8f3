"""Tensor subclasses of other libraries, which know torch's functions and not ours: as weights, as inputs, in modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from fused_ops import REGISTRY, fused_gated_linear, fused_layernorm, fused_linear, fused_mlp, fused_rmsnorm
from fused_ops.nn import FusedLayerNorm, FusedLinear
from fused_ops.ops.linear.gated_linear_reference import gated_linear_eager
from fused_ops.ops.linear.linear_reference import linear_eager
from fused_ops.ops.linear.mlp_reference import mlp_eager
from fused_ops.testing import Op
from tests.torch.calls import OperatorsSeen, raw_operators

ATEN = torch.ops.aten


class Quantized(Tensor):
    """int8 numbers and a scale a row: a weight that knows how to be multiplied, and nothing else."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor, size: Any = None) -> Quantized:
        size = numbers.shape if size is None else size
        return Tensor._make_wrapper_subclass(cls, size, dtype=scale.dtype, device=scale.device)  # type: ignore[attr-defined]

    def __init__(self, numbers: Tensor, scale: Tensor, size: Any = None) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def of(cls, weight: Tensor) -> Quantized:
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def wide(self) -> Tensor:
        return self.numbers * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Quantized:
        return cls(inner["numbers"], inner["scale"], size)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (ATEN.linear.default, ATEN.mm.default, ATEN.addmm.default):
            return func(*(a.wide() if isinstance(a, Quantized) else a for a in args))
        if func is ATEN.t.default:
            return args[0].wide().t()
        if func in (ATEN.detach.default, ATEN.alias.default):
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"Quantized knows no {func}. Nothing more.")


class Overriding(Quantized):
    """The same by torch functions, noting what it is asked for."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return F.linear(args[0], args[1].wide(), *args[2:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))


each_class: Any = pytest.mark.parametrize("kind", [Quantized, Overriding])


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@each_class
@pytest.mark.parametrize("requires_grad", [False, True])
def test_weights(kind: type[Quantized], requires_grad: bool) -> None:
    """The result and the input's gradient are those of torch's functions on the same weights."""
    x, bias = matrix(3, 8), matrix(6).requires_grad_(requires_grad)
    w1, w2, up = kind.of(matrix(6, 8)), kind.of(matrix(5, 6)), kind.of(matrix(6, 8))
    x.requires_grad_(requires_grad)
    calls: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...]]] = [
        *((fused_linear, linear_eager, (x, w1, b, act)) for b in (bias, None) for act in (None, "gelu", "relu2")),
        (fused_gated_linear, gated_linear_eager, (x, w1, up, "silu")),
        (fused_gated_linear, gated_linear_eager, (x, w1, matrix(6, 8), "silu", bias)),
        (fused_mlp, mlp_eager, (x, w1, bias, w2, None)),
        (fused_mlp, mlp_eager, (x, matrix(6, 8), bias, w2, None, "relu")),
    ]
    for ours, eager, args in calls:
        with OperatorsSeen() as seen:
            y = ours(*args)
        expected = eager(*(a.wide() if isinstance(a, Quantized) else a for a in args))
        assert type(y) is Tensor
        torch.testing.assert_close(y, expected)
        if requires_grad:
            for a, b in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)):
                torch.testing.assert_close(a, b)
        assert not seen


def test_a_torch_function_override_sees_torchs_functions() -> None:
    """A wrapper's override need not know the public functions: it is asked for those that it may know."""
    Overriding.seen.clear()
    fused_linear(matrix(3, 8), Overriding.of(matrix(6, 8)), None, "gelu")
    assert F.linear in Overriding.seen
    assert fused_linear not in Overriding.seen


@each_class
def test_modules(kind: type[Quantized]) -> None:
    """As torchao leaves them: a module whose weight has been replaced. Eager, compiled, and exported."""
    model = nn.Sequential(FusedLayerNorm(8), FusedLinear(8, 6, activation="gelu"), FusedLinear(6, 4))
    for layer in (model[1], model[2]):
        layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
    wide = [layer.weight.wide() for layer in (model[1], model[2])]
    x = matrix(3, 8)
    expected = F.linear(F.gelu(F.linear(F.layer_norm(x, (8,)), wide[0], model[1].bias)), wide[1], model[2].bias)
    torch.testing.assert_close(model(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    assert raw_operators(exported) == {"fused_ops.layer_norm_fwd.default"}


def test_what_a_class_does_not_know_is_refused_in_our_words() -> None:
    x, odd = matrix(3, 8), Quantized.of(matrix(1, 8))
    sentence = "got a tensor of class Quantized, allowed: what torch.nn.functional takes, which says: Quantized knows no aten."
    for name, call in {
        "fused_layernorm: weight": lambda: fused_layernorm(x, (1, 8), odd),
        "fused_layernorm: input": lambda: fused_layernorm(odd, (8,), x[0]),
        "fused_rmsnorm: weight": lambda: fused_rmsnorm(x.view(3, 1, 8), (1, 8), odd),
    }.items():
        with pytest.raises(NotImplementedError, match=f"^{re.escape(f'{name}: {sentence}')}") as caught:
            call()
        assert str(caught.value.__cause__).startswith("Quantized knows no aten.")
        assert "Nothing more" not in str(caught.value)


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items()])
def test_a_wrapper_in_each_place(op: Op) -> None:
    """A wrapper that knows every operator gives what torch's functions give, and no operator of ours meets it."""
    sample = op.example("cpu", torch.float32)
    positions = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor) and a.dtype is torch.float32]
    assert positions
    for position in positions:
        args = [TwoTensor(a, a * 2) if i == position else a for i, a in enumerate(sample.args)]
        with OperatorsSeen() as seen:
            ours = op.public(*args, **sample.kwargs)
        assert not seen
        eager = op.torch_fn(*args, **sample.kwargs)
        for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (ours, eager))):
            assert isinstance(a, TwoTensor)
            for part, other in ((a.a, b.a), (a.b, b.b)):
                assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items() if op.trains])
def test_gradients_of_a_wrapper(op: Op) -> None:
    """Training with a wrapper as input and parameters."""
    sample = op.example("cpu", torch.float32)
    found = []
    for function in (op.public, op.torch_fn):
        args = [TwoTensor(a, a * 2).requires_grad_() if isinstance(a, Tensor) else a for a in sample.args]
        leaves = [a for a in args if isinstance(a, Tensor)]
        found.append(torch.autograd.grad(function(*args, **sample.kwargs).square().sum(), leaves))
    for a, b in zip(*found):
        assert torch.equal(a.a, b.a)
        assert torch.equal(a.b, b.b)


def test_out_of_memory_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Quantized, "__torch_dispatch__", classmethod(out_of_memory))
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        fused_linear(matrix(3, 8), Quantized(torch.ones(6, 8, dtype=torch.int8), torch.ones(6, 1)))
