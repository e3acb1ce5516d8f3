"""Calls of the norms in mixes of float dtypes, with what the numerics contract allows of their results and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops.testing import Expected, Op, contract_error

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NORMS = {name: op for name, op in REGISTRY.items() if "v" in op.roles.inputs.split()}
TRAINED_NORMS = {name: op for name, op in NORMS.items() if op.trains}
N = 4

Mix = tuple[Any, ...]
"""The dtypes of input and parameters, None for an absent parameter."""


def every_mix(op: Op) -> list[Mix]:
    """Every dtype of input with every dtype, or absence, of each parameter."""
    return list(itertools.product(DTYPES, *([(None, *DTYPES)] * _parameters(op))))


def some_mixes(op: Op) -> list[Mix]:
    """Mixes among which is every pair of input's dtype and a parameter's, and four fifths of the pairs of parameters."""
    choices = (None, *DTYPES)
    mixes = []
    for i, dtype in enumerate(DTYPES):
        for j, weight in enumerate(choices):
            mixes.append((dtype, weight, choices[(i + j + 1) % 5])[: 1 + _parameters(op)])
    return mixes


def _parameters(op: Op) -> int:
    return op.roles.inputs.split().count("v")


def tensors_of(mix: Mix, rows: int = 3) -> list[Tensor | None]:
    """input (rows, N) and the parameters, the same values in every mix, rounded."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, N), (N,), (N,))]
    return [None if dtype is None else tensor.to(dtype, copy=True) for tensor, dtype in zip(drawn, mix)]


def call_of(op: Op, tensors: Sequence[Tensor | None]) -> tuple[Callable[..., Any], list[Tensor]]:
    """(a function of the tensors that are there, which calls the op; those tensors)."""
    there = [tensor is not None for tensor in tensors]

    def call(*given: Tensor) -> Any:
        left = iter(given)
        input, *parameters = [next(left) if is_there else None for is_there in there]
        return op.public(input, [N], *parameters)

    return call, [tensor for tensor in tensors if tensor is not None]


def exact_of(op: Op, tensors: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """What call_of computes by torch's own function, for tensors in fp64. ATen's double backward is right with a weight only."""
    there = [tensor is not None for tensor in tensors]

    def exact(*given: Tensor) -> Tensor:
        left = iter(given)
        input, weight, *others = [next(left) if is_there else None for is_there in there]
        assert input is not None
        weight = torch.ones(N, dtype=torch.float64) if weight is None else weight
        result: Tensor = op.torch_fn(input, [N], weight, *others)
        return result

    return exact


class _Arguments(TorchDispatchMode):
    """Notes the arguments of the raw operators of an op."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.raw = {raw.overload: raw for raw in op.raw}
        self.bounds: list[tuple[Expected | None, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.raw:
            self.bounds.append(self.raw[func].bound(*args))
        return func(*args, **(kwargs or {}))


def bounds_of(call: Callable[..., Any], op: Op, leaves: Sequence[Tensor], dy: Tensor) -> list[Expected]:
    """What the contract allows of call(*leaves) and, for this dy, of the gradient of each leaf, in order."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with _Arguments(op) as seen:
        call(*leaves).backward(dy)
    (y, *_), gradients = seen.bounds
    found = [expected for expected in (y, *gradients) if expected is not None]
    assert len(found) == 1 + len(leaves)
    return found


def outside(results: Sequence[Tensor], bounds: Sequence[Expected], dtypes: Sequence[torch.dtype]) -> Iterator[str]:
    """What is wrong with these results: their dtypes, and elements beyond the contract."""
    for i, (result, bound, dtype) in enumerate(zip(results, bounds, dtypes, strict=True)):
        if result.dtype is not dtype:
            yield f"result {i} is {result.dtype}, not {dtype}"
        elif result.numel() and (worst := contract_error(result, bound).max().item()) > 1:
            yield f"result {i} is beyond the contract by {worst:.3g}"


def far(ours: Tensor | None, exact: Tensor | None, mix: Mix) -> bool:
    """Whether a derivative of higher order, all of whose parts are rounded to the mix's dtypes, is not near the exact one."""
    if ours is None or exact is None:
        return ours is not exact
    unit = max(torch.finfo(dtype).eps for dtype in (*mix, torch.float32) if dtype is not None)
    return bool(((ours.double() - exact).abs() > 16 * unit * (1 + exact.abs().max())).any())
