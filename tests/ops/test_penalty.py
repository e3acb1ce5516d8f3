"""A loss of an op's result and of its gradients at once: what flows back through a saved tensor adds to what flows through it."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.testing import Op
from tests.contract import TRAINED
from tests.torch.calls import Call, each_call


def _gradients(function: Callable[..., Any], leaves: list[Tensor], penalised: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a loss of the result plus a penalty on the gradients of some leaves, for all leaves that need one."""
    out = function(*leaves)
    first = torch.autograd.grad(out.square().sum(), penalised, create_graph=True)
    loss = out.sin().sum() + sum(((i + 1) * grad.square().sum() for i, grad in enumerate(first)), torch.zeros(()))
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], allow_unused=True)


@each_call
def test_loss_plus_gradient_penalty(call: Call) -> None:
    for chosen in itertools.chain(itertools.combinations(range(len(call.letters)), 1), [range(len(call.letters))]):
        results = []
        for function in (call.ours, call.aten):
            leaves = call.tensors(torch.float64, requires_grad=True)
            results.append(_gradients(function, leaves, [leaves[i] for i in chosen]))
        torch.testing.assert_close(*results, msg=lambda text, chosen=chosen: f"penalty on {tuple(chosen)}: {text}")


def _variants(op: Op) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(name, args, kwargs) of a small sample for each set of arguments that are no tensors, the basic one first: every
    activation of the linear family, with and without recomputation."""
    samples = sorted(op.samples("cpu", torch.float64), key=lambda sample: "basic" not in sample.tags)
    flags = [{"recompute": on} for on in (False, True)] if "recompute" in inspect.signature(op.public).parameters else [{}]
    seen = set()
    for sample, flag in itertools.product(samples, flags):
        tensors = [a for a in sample.args if isinstance(a, Tensor)]
        kwargs = {**sample.kwargs, **flag}
        if kwargs.get("dtype", torch.float64) is not torch.float64:
            continue  # rounded between the two backwards
        key = str([type(a) if isinstance(a, Tensor) else a for a in sample.args]) + str(kwargs)
        if key not in seen and all(0 < t.numel() <= 500 and t.isfinite().all() and t.dtype is torch.float64 for t in tensors):
            seen.add(key)
            yield f"{sample.name}{flag or ''}", sample.args, kwargs


def _torchs(op: Op) -> Callable[..., Tensor]:
    """What torch computes. Its layer_norm gets ones for a weight: without one, the bias's second derivative is left out."""
    if op.torch_fn is not F.layer_norm:
        return op.torch_fn

    def layer_norm(x: Tensor, shape: Any, weight: Tensor | None = None, *rest: Any, **kwargs: Any) -> Tensor:
        return F.layer_norm(x, shape, x.new_ones(tuple(shape)) if weight is None else weight, *rest, **kwargs)

    return layer_norm


@pytest.mark.parametrize("name", TRAINED)
def test_what_needs_a_gradient(name: str) -> None:
    """Every variant with all tensors, and with each tensor alone; the first two variants with every subset."""
    op, tried = TRAINED[name], 0
    for label, args, kwargs in _variants(op):
        count = sum(isinstance(a, Tensor) for a in args)

        def call(function: Callable[..., Tensor], *tensors: Tensor, args: Any = args, kwargs: Any = kwargs) -> Tensor:
            left = iter(tensors)
            return function(*[next(left) if isinstance(a, Tensor) else a for a in args], **kwargs)

        for needs in itertools.product((False, True), repeat=count):
            if sum(needs) not in ((1, count) if tried >= 2 else range(1, count + 1)):
                continue
            results = []
            for function in (op.public, _torchs(op)):
                own = [a.detach().clone() for a in args if isinstance(a, Tensor)]
                wanted = [t.requires_grad_() for t, need in zip(own, needs) if need]
                results.append(_gradients(functools.partial(call, function), own, wanted))
            said = functools.partial("{} {}: {}".format, label, needs)
            torch.testing.assert_close(*results, equal_nan=True, msg=said)
        tried += 1
    assert tried >= 2
