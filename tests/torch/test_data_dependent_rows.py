"""Row counts that depend on data, x[mask], under torch.compile(fullgraph=True): one graph that is right for any number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import Op, Sample

MOST = 6


@pytest.fixture(autouse=True)
def _captured() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


CALLS = [
    *(pytest.param(op, {}, id=name) for name, op in REGISTRY.items()),
    pytest.param(REGISTRY["mlp"], {"recompute": True}, id="mlp-recompute"),
]


def picked(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor[mask], which torch has not for fp8."""
    return tensor[mask] if tensor.itemsize > 1 else tensor.view(torch.uint8)[mask].view(tensor.dtype)


def with_rows(sample: Sample) -> tuple[list[Any], list[int]]:
    """The sample's arguments with an input of MOST rows, and the places of the tensors that have one of its rows each."""
    given = list(sample.args)
    M = given[0].shape[0]
    rows = [i for i, a in enumerate(given) if isinstance(a, Tensor) and a.shape[:1] == (M,) and (i == 0 or a.dim() == 1)]
    for i in rows:
        given[i] = given[i][torch.arange(MOST) % M] if given[i].itemsize > 1 else picked(given[i], torch.arange(MOST) % M)
    return given, rows


@pytest.mark.parametrize(("op", "more"), CALLS)
def test_any_number_of_rows(op: Op, more: dict[str, Any]) -> None:
    sample = op.example("cpu", torch.float32)
    given, rows = with_rows(sample)
    kwargs = sample.kwargs | more

    def call(mask: Tensor, *args: Any) -> tuple[Tensor, ...]:
        out = op.public(*[picked(a, mask) if i in rows else a for i, a in enumerate(args)], **kwargs)
        return out if isinstance(out, tuple) else (out,)

    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    trained = [i for i, a in enumerate(given) if op.trains and isinstance(a, Tensor)]
    for number in (3, 0, 1, MOST):
        mask = torch.arange(MOST) < number
        results = []
        for run in (compiled, call):
            args = [a.clone().requires_grad_() if i in trained else a for i, a in enumerate(given)]
            out = run(mask, *args)
            leaves = [args[i] for i in trained]
            results.append((*out, *(torch.autograd.grad(out[0].square().sum(), leaves) if leaves else ())))
        for got, expected in zip(*results, strict=True):
            assert got.shape == expected.shape
            torch.testing.assert_close(got.float(), expected.float())
        assert results[0][0].shape[0] == number
    assert len(graphs) == 1
