"""The calls that the tests of this folder share: the example of each op that trains, beside what PyTorch users write today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops.testing import Op, Sample, roles_of

ROWS = frozenset("xyzs")  # the roles whose first dimensions are the batch's


@dataclass(frozen=True)
class Call:
    """An op's example as functions of its tensors: ours(*tensors) and aten(*tensors).

    letters: the role of each tensor. Those with rows are drawn as (4, 3, width); the others are the example's own.
    """

    op: Op
    example: Sample
    letters: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.op.name

    def ours(self, *tensors: Tensor) -> Any:
        args, kwargs = self.filled(tensors)
        return self.op.public(*args, **kwargs)

    def aten(self, *tensors: Tensor) -> Any:
        args, kwargs = self.filled(tensors)
        return self.op.torch_fn(*args, **kwargs)

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example's arguments with these tensors in the place of its own."""
        left = list(tensors)
        args = tuple(left.pop(0) if isinstance(a, Tensor) else a for a in self.example.args)
        kwargs = {name: left.pop(0) if isinstance(a, Tensor) else a for name, a in self.example.kwargs.items()}
        return args, kwargs

    def tensors(
        self, dtype: torch.dtype = torch.float32, requires_grad: bool = False, batch: int = 4, middle: int = 3
    ) -> list[Tensor]:
        """New leaves of this dtype; those with rows are (batch, middle, width)."""
        generator = torch.Generator().manual_seed(11)
        made = []
        for tensor, letter in zip(self.own, self.letters):
            if letter in ROWS:
                shape = (batch, middle, *tensor.shape[1:])
                tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
            made.append(tensor.to(dtype, copy=True).requires_grad_(requires_grad))
        return made

    @property
    def own(self) -> list[Tensor]:
        """The example's tensors, in fp64."""
        return [a for a in (*self.example.args, *self.example.kwargs.values()) if isinstance(a, Tensor)]


def _call(op: Op) -> Call:
    example = op.example("cpu", torch.float64)
    return Call(op, example, roles_of(op, example))


CALLS = tuple(_call(op) for op in REGISTRY.values() if op.trains)
CALL = {call.name: call for call in CALLS}

each_call: Any = pytest.mark.parametrize("call", [pytest.param(call, id=call.name) for call in CALLS])


class OperatorsSeen(TorchDispatchMode):
    """While active, notes the names of fused_ops operators that run: `with OperatorsSeen() as names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __enter__(self) -> Any:
        super().__enter__()
        return self.names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("fused_ops."):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def raw_operators(graph: Any) -> set[str]:
    """The names of fused_ops operators in an fx graph, its subgraphs included."""
    modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(n.target) for m in modules for n in m.graph.nodes if str(n.target).startswith("fused_ops.")}
