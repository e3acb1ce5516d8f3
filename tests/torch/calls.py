"""The calls that the tests of this folder share: each op beside what PyTorch users write today."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import fused_layernorm, fused_linear, fused_softmax


@dataclass(frozen=True)
class Call:
    """ours(*tensors) and aten(*tensors), on tensors of these shapes; the first dimension of the first is the batch."""

    name: str
    ours: Callable[..., Tensor]
    aten: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def tensors(
        self, dtype: torch.dtype = torch.float32, requires_grad: bool = False, batch: int | None = None
    ) -> list[Tensor]:
        shapes = list(self.shapes)
        if batch is not None:
            shapes[0] = (batch, *shapes[0][1:])
        generator = torch.Generator().manual_seed(11)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return [t.requires_grad_(requires_grad) for t in drawn]


CALLS = (
    Call(
        "layer_norm", lambda x, w, b: fused_layernorm(x, (6,), w, b), lambda x, w, b: F.layer_norm(x, (6,), w, b),
        ((4, 3, 6), (6,), (6,)),
    ),
    Call("softmax", lambda x: fused_softmax(x, 1), lambda x: F.softmax(x, 1), ((4, 3, 6),)),
    Call(
        "linear", lambda x, w, b: fused_linear(x, w, b, "gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b)),
        ((4, 3, 6), (5, 6), (5,)),
    ),
)  # fmt: skip

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
