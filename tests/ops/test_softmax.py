"""Softmax through ATen, within the contract from every dtype to every dtype, over every dimension and on every path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fused_ops import REGISTRY, compile_with_aten, fused_softmax
from fused_ops.testing import INTERPRET, Expected, assert_within_contract

pytestmark = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")

FORWARD, BACKWARD = (raw.bound for raw in REGISTRY["softmax"].raw)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint32, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn)
SHAPES = (((5, 130), -1), ((130, 5), 0), ((2, 40, 3), 1), ((3, 70, 1), 1), ((1, 2500), -1), ((1500, 2), 0))


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers; integers near the dtype's largest, which no float of 32 bits tells apart."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    if dtype in (torch.int64, torch.int32, torch.uint32):
        numbers = numbers.round() + min(torch.iinfo(dtype).max, 2**50) - 100
    return numbers.abs().to(dtype) if dtype is torch.uint8 else numbers.to(dtype)


def ties(shape: tuple[int, ...], dim: int, value: float) -> Tensor:
    """One 0, and the same number everywhere else over dim: each addition of the same term errs to the same side."""
    x = torch.full(shape, value)
    x.select(dim, 0).fill_(0.0)
    return x


def slack(expected: Expected) -> Expected:
    """A bound for what is computed from a rounded y, where expected is of the exact one."""
    return Expected(expected.value, 2 * expected.scale)


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_every_dtype(dtype: torch.dtype, out: torch.dtype) -> None:
    for shape, dim in SHAPES:
        x = drawn(shape, dtype)
        (expected,) = FORWARD(x, dim, out)
        for y in (fused_softmax(x, dim, dtype=out), vmap(lambda a, d=dim: fused_softmax(a, d, dtype=out))(x[None])[0]):
            assert y.dtype is out
            assert y.is_contiguous()
            assert_within_contract(y, expected, f"{shape} over {dim}")


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_and_its_gradients(dtype: torch.dtype, out: torch.dtype) -> None:
    """The backward, the one that is itself differentiable, and the transforms' two."""
    for shape, dim in SHAPES:
        x, dy, dx = drawn(shape, dtype).requires_grad_(), drawn(shape, out, seed=1), drawn(shape, dtype, seed=2)
        y = fused_softmax(x, dim, dtype=None if dtype is out else out)
        assert_within_contract(y, FORWARD(x.detach(), dim, out)[0])
        (expected,) = BACKWARD(dy, y.detach(), dim, dtype)
        for options in ({"retain_graph": True}, {"create_graph": True}):
            (grad,) = torch.autograd.grad(y, x, dy, **options)
            assert grad.dtype is dtype
            assert_within_contract(grad.detach(), expected, f"{options}: {shape} over {dim}")
        exact = x.detach().double().softmax(dim)
        _, tangent = jvp(lambda a, d=dim: fused_softmax(a, d, dtype=out), (x.detach(),), (dx,))
        assert_within_contract(tangent, slack(BACKWARD(dx, exact, dim, out)[0]), f"jvp: {shape} over {dim}")
        _, pull = vjp(lambda a, d=dim: fused_softmax(a, d, dtype=out), x.detach())
        assert_within_contract(pull(dy)[0], slack(BACKWARD(dy, exact, dim, dtype)[0]), f"vjp: {shape} over {dim}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((1, 70001), 1), ((1, 4000), -1), ((1500, 3), 0), ((2, 130, 1), 1)])
def test_many_equal_terms(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    """ATen adds them one after the other, which errs with N and not with its root."""
    for value in (-0.3, -1.0, -2.3):
        x = ties(shape, dim, value).to(dtype)
        (expected,) = FORWARD(x, dim, None)
        leaf = x.clone().requires_grad_()
        y = fused_softmax(leaf, dim)
        for out in (y, fused_softmax(x, dim), vmap(lambda a: fused_softmax(a, dim))(x[None])[0]):
            assert_within_contract(out, expected, f"{value}")
        dy = torch.full(shape, 0.7).to(dtype)
        for options in ({"retain_graph": True}, {"create_graph": True}):
            (grad,) = torch.autograd.grad(y, leaf, dy, **options)
            assert_within_contract(grad.detach(), BACKWARD(dy, y.detach(), dim, dtype)[0], f"{value}, {options}")


def test_second_order_to_a_narrower_dtype() -> None:
    """Of fp64 to fp32 and back: as precise as fp32, which the backward's own dtypes do not say."""
    x = drawn((3, 40), torch.float64).requires_grad_()
    exact = x.detach().requires_grad_()
    results = []
    for leaf, y in ((x, fused_softmax(x, 0, dtype=torch.float32)), (exact, exact.softmax(0))):
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        results.append((grad, torch.autograd.grad(grad.square().sum(), leaf)[0]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


CALLS = [
    (torch.float32, torch.bfloat16, -1), (torch.float64, torch.float16, -1), (torch.int64, torch.float16, 0),
    (torch.bfloat16, None, 0), (torch.float16, None, -1), (torch.float16, torch.bfloat16, 1), (torch.float32, None, 0),
]  # fmt: skip


def calls(*inputs: Tensor) -> list[Tensor]:
    return [fused_softmax(x, dim, dtype=out) for x, (_, out, dim) in zip(inputs, CALLS)]


def held(results: list[Tensor], inputs: list[Tensor]) -> None:
    for y, x, (_, out, dim) in zip(results, inputs, CALLS):
        assert y.dtype is (out or x.dtype)
        assert y.is_contiguous()
        assert_within_contract(y, FORWARD(x, dim, out)[0], f"{x.dtype} to {out} over {dim}")


@pytest.fixture
def inputs() -> list[Tensor]:
    return [drawn((9, 40), dtype) for dtype, _, _ in CALLS]


@pytest.fixture(params=[False, True], ids=["operator", "ATen's formula"])
def compiled_with(request: Any) -> Iterator[None]:
    compile_with_aten("softmax", enabled=request.param)
    torch._dynamo.reset()
    yield
    compile_with_aten("softmax", enabled=None)


@pytest.mark.usefixtures("compiled_with")
def test_compiled(inputs: list[Tensor]) -> None:
    held(torch.compile(calls, fullgraph=True, dynamic=True, backend="aot_eager")(*inputs), inputs)


@pytest.mark.usefixtures("compiled_with")
@pytest.mark.parametrize("dim", [0, 1])
def test_compiled_with_a_number_of_rows_that_the_data_decide(dim: int) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, mask: fused_softmax(x[mask], dim), fullgraph=True, backend="aot_eager")
        for rows in (6, 0, 1):
            x, mask = torch.randn(6, 5, requires_grad=True), torch.arange(6) < rows
            y = compiled(x, mask)
            torch.testing.assert_close(y, x[mask].softmax(dim))
            y.square().sum().backward()
            assert x.grad is not None


@pytest.mark.parametrize("context", ["trace", "bfloat16", "float16"])
def test_traced_and_under_autocast(inputs: list[Tensor], context: str) -> None:
    if context == "trace":
        held(torch.jit.trace(calls, tuple(inputs))(*inputs), inputs)
    else:
        with torch.autocast("cpu", dtype=getattr(torch, context)):
            held(calls(*inputs), inputs)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_what_holds_no_data_is_laid_out_alike(device: str) -> None:
    from torch._subclasses import FakeTensorMode

    for dtype in (*FLOATS, *OTHERS):
        for out in FLOATS:
            x = drawn((2, 5, 3), dtype).permute(2, 0, 1)
            y = FakeTensorMode().from_tensor(x) if device == "fake" else x.to("meta")
            for dim in (0, 1, -1):
                got, expected = fused_softmax(y, dim, dtype=out), fused_softmax(x, dim, dtype=out)
                assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
