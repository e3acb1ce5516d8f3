"""The contract on sampled rows, which tests/gpu holds the largest products to: here on small ones, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops.testing import Op, Raw
from tests.gpu.sampled import SAMPLE, hold_sampled, sample
from tests.torch.calls import CALL

SIZES = (300, 144, 96, 48)


def arguments(op: Op, variant: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Those of a benchmark case of the op, with small sizes, in fp32 where it has floats of that kind; with an activation."""
    shape = next(iter(op.bench.shapes.values()))
    variant = variant or next((v for v in op.bench.variants if v and v not in ("none", "None")), None)
    dtype = torch.float32 if op.trains or op.bench.dtypes[0].itemsize > 1 else op.bench.dtypes[0]
    return op.bench.make("cpu", SIZES[: len(shape)], dtype, variant)


def example(op: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The op's example, of an op that trains with 300 rows."""
    if not op.trains:
        sample = op.example("cpu", torch.float32)
        return sample.args, sample.kwargs
    call = CALL[op.name]
    return call.filled([t.flatten(0, -2) if t.dim() > 2 else t for t in call.tensors(batch=SIZES[0], middle=1)])


@pytest.mark.parametrize("op", list(REGISTRY))
def test_what_is_right_passes(op: str) -> None:
    hold_sampled(REGISTRY[op], *arguments(REGISTRY[op]))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("op", [name for name, op in REGISTRY.items() if op.trains and op.bench.variants])
def test_what_keeps_no_pre_activation_passes(op: str, activation: str | None) -> None:
    args, kwargs = arguments(REGISTRY[op], "gelu")
    assert "gelu" in args
    hold_sampled(REGISTRY[op], tuple(activation if isinstance(a, str) else a for a in args), kwargs)


def test_recomputing_passes() -> None:
    hold_sampled(REGISTRY["mlp"], arguments(REGISTRY["mlp"])[0], {"recompute": True})


class Corrupt(TorchDispatchMode):
    """One element of one output of one raw operator is wrong: that at a sampled row and column."""

    def __init__(self, op: Any, output: int) -> None:
        super().__init__()
        self.op, self.output, self.done = op, output, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.op:
            out = result[self.output] if isinstance(result, tuple) else result
            if out.numel():
                at = tuple(sample(size)[2] for size in out.shape)
                out[at] = out[at].float() + 2.0 * (1.0 + out[at].float().abs())
                self.done = True
        return result


WRONG = [
    pytest.param(op, raw, i, id=f"{raw.name}-{i}")
    for op in REGISTRY.values()
    for raw in op.raw
    for i in range(len(raw.overload._schema.returns))
]


@pytest.mark.parametrize(("op", "raw", "output"), WRONG)
def test_one_wrong_element_is_noticed(op: Op, raw: Raw, output: int) -> None:
    args, kwargs = example(op)
    with Corrupt(raw.overload, output) as corrupt, pytest.raises(AssertionError, match=f"output {output}, sampled"):
        hold_sampled(op, args, kwargs)
    assert corrupt.done


@pytest.mark.parametrize("size", [1, 16, 300, 8192, 12608])
def test_the_sample_has_the_ends_and_the_edges_of_tiles(size: int) -> None:
    found = sample(size)
    assert found == sorted(set(found))
    assert len(found) == min(SAMPLE, size)
    assert {0, size - 1} <= set(found)
    assert size < 1000 or {127, 128, 255, 256, size - 128, size - 129} <= set(found)
