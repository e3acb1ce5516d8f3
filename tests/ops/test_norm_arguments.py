"""The norms' arguments: what torch takes is taken, what it does not is refused in one short sentence; and dimensions of any size."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from fused_ops import fused_layernorm, fused_rmsnorm
from fused_ops.nn import FusedLayerNorm, FusedRMSNorm
from fused_ops.testing import INTERPRET, Op
from tests.torch.mixes import NORMS, TRAINED_NORMS

each_norm: Any = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in NORMS.items()])
each_trained: Any = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in TRAINED_NORMS.items()])

SHAPES = ([4], (4,), torch.Size([4]), [np.int64(4)], (np.int32(4),), [torch.tensor(4)], [torch.tensor([4])])
EPSES = (
    0, 1, True, 1e-3, np.float32(1e-3), np.float64(1e-3), np.int64(1), torch.tensor(1e-3), torch.tensor(1), float("nan"),
    float("inf"), -1.0, 1e300,
)  # fmt: skip


class Index:
    """An int to whoever asks for one."""

    def __index__(self) -> int:
        return 4


@each_trained
@pytest.mark.parametrize("needs_grad", [False, True])
def test_what_torch_takes_is_taken(op: Op, needs_grad: bool) -> None:
    x, w = torch.randn(3, 4, requires_grad=needs_grad), torch.randn(4)
    for shape in (*SHAPES, [Index()]):
        torch.testing.assert_close(op.public(x, shape, w), op.torch_fn(x, shape, w))
    for eps in EPSES:
        torch.testing.assert_close(op.public(x, [4], w, eps=eps), op.torch_fn(x, [4], w, eps=eps), equal_nan=True)
    for one in (4, np.int64(4)):  # as torch.nn.LayerNorm takes them
        torch.testing.assert_close(op.public(x, one, w), op.torch_fn(x, [4], w))


def hostile() -> Iterator[Any]:
    """Values of every kind, that are no shape, no number and no tensor of the norm's, and large when printed."""
    yield from (None, True, 4.0, "4" * 9999, b"4" * 9999, 1j, {4}, {4: 4}, range(4), object(), Index, np.ones(4096), 10**5000)
    yield from (torch.ones(4096), torch.ones(64, 64, requires_grad=True), torch.tensor(4.0), torch.tensor([4]))
    yield from (
        [torch.ones(4096)] * 3,
        [4.0],
        [True],
        [None],
        ["4" * 9999],
        [[4]],
        [np.float32(4)],
        [np.bool_(True)],
        [10**5000],
    )
    yield from (list(range(9999)), [torch.tensor(True)], [1j] * 9999, (), [])


def taken(op: Op, argument: str, value: Any) -> bool:
    """Whether the norm takes the value, or (a tensor as input) refuses another argument for it."""
    if value is None:
        default = inspect.signature(op.public).parameters[argument].default
        return default is None
    number = isinstance(value, (bool, float)) or (isinstance(value, Tensor) and value.dim() == 0)
    return (argument == "eps" and number) or (argument == "input" and isinstance(value, Tensor))


@each_norm
@pytest.mark.parametrize("needs_grad", [False, True])
def test_refusals_are_one_short_sentence(op: Op, needs_grad: bool) -> None:
    """Whatever comes in the place of whichever argument: the message names it, and prints no tensor."""
    x = torch.randn(3, 4, requires_grad=needs_grad and op.trains)
    refused, wrong = 0, []
    for argument in inspect.signature(op.public).parameters:
        for value in hostile():
            if taken(op, argument, value):
                continue
            try:
                op.public(**{"input": x, "normalized_shape": [4], argument: value})
            except (TypeError, RuntimeError, OverflowError) as error:
                said = str(error)
                refused += 1
                if not said.startswith(f"{op.public.__name__}: {argument}: got ") or "allowed: " not in said:
                    wrong.append(said[:200])
                if len(said) > 250 or "tensor(" in said or "\n" in said:
                    wrong.append(said[:200])
            else:
                wrong.append(f"{argument} of class {type(value).__name__[:40]} is taken")
    assert not wrong
    assert refused > 80


def test_a_call_in_another_librarys_order() -> None:
    """Liger's functions take (x, weight, bias)."""
    x, w = torch.randn(2, 4096), torch.ones(4096)
    with pytest.raises(
        TypeError,
        match=r"^fused_layernorm: normalized_shape: got a Tensor of shape \(4096,\) and torch\.float32, allowed: a list or tuple of ints",
    ):
        fused_layernorm(x, w, w)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^fused_rmsnorm: normalized_shape: got a Tensor"):
        fused_rmsnorm(x, w)  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRET, reason="what a compiler sees: unset TRITON_INTERPRET")
def test_entries_that_a_compiler_does_not_read() -> None:
    """An int of numpy's, as torch.nn.LayerNorm(np.int64(4)) holds one."""
    x = torch.randn(3, 4)
    for norm in (FusedLayerNorm(np.int64(4)), FusedRMSNorm(np.int64(4))):  # type: ignore[arg-type]
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="eager")(x), norm(x))


def sizes() -> list[tuple[int, ...]]:
    """Shapes of one to four dimensions, each of them empty, 1 or 2; of those of three and four, the empty ones."""
    drawn = [size for rank in (1, 2, 3) for size in itertools.product((0, 1, 2), repeat=rank) if rank < 3 or 0 in size]
    return [*drawn, *((2, *size) for size in drawn if len(size) == 3)]


@each_norm
def test_empty_dimensions(op: Op) -> None:
    """Forward, gradients of first and second order, vmap and jvp for every shape and every number of normalised dimensions."""
    parameters = op.roles.inputs.split().count("v")
    for shape in sizes():
        for normalised in range(1, len(shape) + 1):
            of = shape[-normalised:]
            given = [torch.randn(shape), *(torch.randn(of) for _ in range(parameters))]
            try:
                _hold_empty(op, given, of)
            except Exception as error:
                raise AssertionError(f"{shape} over {of}") from error


def _hold_empty(op: Op, given: list[Tensor], of: tuple[int, ...]) -> None:
    def call(*tensors: Tensor) -> Any:
        return op.public(tensors[0], of, *tensors[1:])

    vmap(call, (0, *(None for _ in given[1:])))(torch.stack([given[0]] * 2), *given[1:])
    jvp(call, tuple(given), tuple(given))
    if not op.trains:
        q, scale = call(*given)
        assert (q.shape, scale.shape) == (given[0].shape, given[0].shape[: given[0].dim() - len(of)])
        return
    torch.testing.assert_close(call(*given), op.torch_fn(given[0], of, *given[1:]), equal_nan=True)
    leaves = [tensor.requires_grad_() for tensor in given]
    y = call(*leaves)
    for create_graph in (False, True):
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=create_graph, retain_graph=True)
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
        assert y.numel() or not any(g.count_nonzero() for g in gradients)
    penalty = y.square().sum() + sum(g.square().sum() for g in gradients)
    assert [g.shape for g in torch.autograd.grad(penalty, leaves)] == [leaf.shape for leaf in leaves]
