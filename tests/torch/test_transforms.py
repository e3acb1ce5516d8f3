"""torch.func, forward-mode AD, second derivatives, inference mode, and tensor subclasses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fused_ops import REGISTRY
from fused_ops.nn import FusedLayerNorm, FusedLinear
from fused_ops.testing import Op
from tests.torch.calls import Call, OperatorsSeen, each_call


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


@each_call
def test_vmap_over_each_argument(call: Call) -> None:
    tensors = call.tensors(torch.float64)
    for i in range(len(tensors)):
        many = [torch.stack([t, t * 2, t - 1]) if i == j else t for j, t in enumerate(tensors)]
        dims = tuple(0 if i == j else None for j in range(len(tensors)))
        close(vmap(call.ours, dims)(*many), vmap(call.aten, dims)(*many))


@each_call
def test_per_sample_gradients(call: Call) -> None:
    x, *parameters = call.tensors(torch.float64)
    dims = (0, *(None for _ in parameters))
    arguments = tuple(range(len(dims)))

    def of(function: Any) -> Any:
        single = grad(lambda x, *p: function(x.unsqueeze(0), *p).square().sum(), argnums=arguments)
        return vmap(single, dims)(x, *parameters)

    close(of(call.ours), of(call.aten))


@each_call
def test_jvp_vjp_jacobians_and_hessian(call: Call) -> None:
    tensors = call.tensors(torch.float64, batch=1)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    close(jvp(call.ours, tuple(tensors), tangents), jvp(call.aten, tuple(tensors), tangents))
    out, pull = vjp(call.ours, *tensors)
    other, other_pull = vjp(call.aten, *tensors)
    close(pull(torch.ones_like(out)), other_pull(torch.ones_like(other)))
    close(jacrev(call.ours)(*tensors), jacfwd(call.aten)(*tensors))
    small = [t[:1, :2] if t.dim() == 3 else t for t in tensors]
    close(hessian(lambda *t: call.ours(*t).square().sum())(*small), hessian(lambda *t: call.aten(*t).square().sum())(*small))


@each_call
def test_forward_mode(call: Call) -> None:
    tensors = call.tensors(torch.float64)
    tangents = [torch.randn_like(t) for t in tensors]
    results = []
    for function in (call.ours, call.aten):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, s) for t, s in zip(tensors, tangents)]
            results.append(forward_ad.unpack_dual(function(*duals)))
    close(tuple(results[0]), tuple(results[1]))


@each_call
def test_second_derivatives(call: Call) -> None:
    tensors = call.tensors(torch.float64, requires_grad=True)
    assert gradcheck(call.ours, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call.ours, tensors, fast_mode=True)


@each_call
def test_vectorized_backward(call: Call) -> None:
    """is_grads_batched runs our backward under vmap."""
    tensors = call.tensors(torch.float64, requires_grad=True)
    out, other = call.ours(*tensors), call.aten(*tensors)
    batch = torch.randn(3, *out.shape, dtype=torch.float64)
    close(
        torch.autograd.grad(out, tensors, batch, is_grads_batched=True),
        torch.autograd.grad(other, tensors, batch, is_grads_batched=True),
    )


@each_call
def test_inference_mode(call: Call) -> None:
    tensors = call.tensors(requires_grad=True)
    with torch.inference_mode():
        out = call.ours(*tensors)
    assert out.is_inference()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        _ = out * torch.ones(1, requires_grad=True)
    torch.testing.assert_close(out.clone(), call.ours(*tensors).detach())


@each_call
def test_the_fast_path_gives_the_dispatchers_bits(call: Call) -> None:
    """Without a mode a call takes the fast path; under one it goes through the dispatcher. Forward and backward agree bit for bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        fast, dispatched = call.tensors(dtype, requires_grad=True), call.tensors(dtype, requires_grad=True)
        y = call.ours(*fast)
        with OperatorsSeen() as seen:
            z = call.ours(*dispatched)
        assert seen == [f"fused_ops.{call.name}_fwd.default"]
        assert torch.equal(y, z)
        assert y.stride() == z.stride()
        assert type(y.grad_fn).__name__ == type(z.grad_fn).__name__
        dy = torch.randn_like(y)
        for a, b in zip(torch.autograd.grad(y, fast, dy), torch.autograd.grad(z, dispatched, dy)):
            assert torch.equal(a, b)
        with torch.no_grad(), OperatorsSeen():
            assert torch.equal(call.ours(*fast), z)


@each_call
def test_negative_bit_and_conjugate_views(call: Call) -> None:
    """A view with the negative bit set: its memory holds the values' negatives."""
    tensors = call.tensors()
    negated = torch.imag(torch.complex(torch.zeros_like(tensors[0]), -tensors[0]).conj())
    assert negated.is_neg()
    torch.testing.assert_close(call.ours(negated, *tensors[1:]), call.ours(*tensors))


def test_functional_call_and_stacked_modules() -> None:
    """An ensemble: one module, a batch of its parameters."""
    model = torch.nn.Sequential(FusedLayerNorm(6), FusedLinear(6, 4, activation="tanh")).double()
    parameters = {name: torch.stack([p, p * 2]).detach() for name, p in model.named_parameters()}
    x = torch.randn(5, 6, dtype=torch.float64)
    together = vmap(lambda p: functional_call(model, p, (x,)))(parameters)
    for i in range(2):
        close(together[i], functional_call(model, {k: v[i] for k, v in parameters.items()}, (x,)))


class Logged(Tensor):
    """A subclass that overrides functions and notes which ones it saw."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items()])
def test_torch_function_override_sees_the_public_function(op: Op) -> None:
    """Wherever the subclass is among the tensors."""
    sample = op.example("cpu", torch.float32)
    expected = op.public(*sample.args, **sample.kwargs)
    positions = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor) and a.dtype is torch.float32]
    assert positions
    for position in positions:
        Logged.seen.clear()
        wrapped = [a.as_subclass(Logged) if i == position else a for i, a in enumerate(sample.args)]
        out = op.public(*wrapped, **sample.kwargs)
        assert Logged.seen[0] is op.public
        for ours, theirs in zip(*((t,) if isinstance(t, Tensor) else t for t in (out, expected))):
            assert isinstance(ours, Logged)
            bits, expected_bits = (t.as_subclass(Tensor).view(torch.uint8) for t in (ours, theirs))
            assert torch.equal(bits, expected_bits)


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items() if not op.trains])
def test_forward_only_ops_have_tangents(op: Op) -> None:
    """An op without gradients is a function of its float tensors all the same: forward-mode AD and jacfwd give its derivative."""
    sample = op.example("cpu", torch.float32)
    places = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor) and a.dtype is torch.float32]
    assert places
    for i in places:
        given = sample.args[i]

        def of(function: Any, tensor: Tensor, i: int = i) -> tuple[Tensor, ...]:
            out = function(*sample.args[:i], tensor, *sample.args[i + 1 :], **sample.kwargs)
            return tuple(t for t in (out if isinstance(out, tuple) else (out,)) if t.itemsize > 1)  # fp8 has no tangent

        tangent = torch.randn(given.shape, generator=torch.Generator().manual_seed(i))
        ours, theirs = (jvp(lambda t, f=f: of(f, t), (given,), (tangent,))[1] for f in (op.public, op.torch_fn))
        torch.testing.assert_close(ours, theirs)
        assert all(t.any() for t in ours)
        with forward_ad.dual_level():
            duals = [forward_ad.unpack_dual(t).tangent for t in of(op.public, forward_ad.make_dual(given, tangent))]
        torch.testing.assert_close(tuple(duals), theirs)
        first = given.flatten()[:2]

        def few(function: Any, part: Tensor, given: Tensor = given) -> Tensor:
            return of(function, torch.cat([part, given.flatten()[len(part) :]]).view(given.shape))[-1].flatten()[:5]

        torch.testing.assert_close(jacfwd(lambda p: few(op.public, p))(first), jacfwd(lambda p: few(op.torch_fn, p))(first))
