"""The generic test of an op: every sample, forward and backward, with each raw operator held to its SPEC."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import ContractMode, Op, Sample

TRAINED = {name: op for name, op in REGISTRY.items() if op.trains}
"""The ops with gradients."""


def cases(dtypes: list[torch.dtype]) -> list[Any]:
    """pytest parameters (op name, dtype, sample index) of every sample of every op with gradients."""
    import pytest

    return [
        pytest.param(name, dtype, i, id=f"{name}-{str(dtype)[6:]}-{sample.name}")
        for name in TRAINED
        for dtype in dtypes
        for i, sample in enumerate(_samples(name, dtype))
    ]


def sample_of(name: str, dtype: torch.dtype, index: int) -> tuple[Op, Sample]:
    """An op and one of its samples, whose tensors other tests are given too: they are to be read, not changed."""
    return REGISTRY[name], _samples(name, dtype)[index]


@functools.cache
def _samples(name: str, dtype: torch.dtype) -> tuple[Sample, ...]:
    return tuple(REGISTRY[name].samples("cpu", dtype))


def leaves(args: tuple[Any, ...]) -> tuple[list[Any], list[Tensor]]:
    """The arguments with their float tensors made leaves that need a gradient, layout kept, and those leaves."""
    new = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return new, [a for a in new if isinstance(a, Tensor) and a.requires_grad]


def hold_to_contract(spec: Op, sample: Sample) -> None:
    """Run the public function on the sample, forward and backward, with a dy of unlike strides."""
    args, wanted = leaves(sample.args)
    with ContractMode() as mode:
        out = spec.public(*args, **sample.kwargs)
        assert mode.checked == [str(spec.fwd)]
        if wanted:
            generator = torch.Generator().manual_seed(3)
            dy = torch.randn(out.shape[::-1], generator=generator, dtype=torch.float64).to(out.dtype)
            dy = dy.permute(tuple(range(out.dim()))[::-1])  # a dy whose strides are not the output's
            out.backward(dy)
            assert mode.checked[:2] == [str(spec.fwd), str(spec.bwd)]
            assert set(mode.checked[2:]) <= {str(REGISTRY["linear"].bwd)}  # the products of a first layer
    for leaf in wanted:
        assert leaf.grad is not None
        assert leaf.grad.dtype is leaf.dtype
        assert leaf.grad.shape == leaf.shape
