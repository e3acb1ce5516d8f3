"""The linear family refuses tensors of different dtypes by the argument's name, on every path; torch's own functions take some of
them under vmap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fused_ops import fused_gated_linear, fused_linear, fused_mlp

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((2, 4), (4, 4), (4,), (4, 4))
OPS: dict[str, tuple[int, Callable[..., Tensor]]] = {  # how many tensors, and the call
    "fused_linear": (3, fused_linear),
    "fused_linear gelu": (3, lambda x, w, b: fused_linear(x, w, b, "gelu")),
    "fused_gated_linear": (4, lambda x, w, b, v: fused_gated_linear(x, w, v, "silu", b)),
    "fused_mlp": (4, lambda x, w, b, v: fused_mlp(x, w, b, v, None)),
}


def paths(function: Callable[..., Tensor], tensors: list[Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    x, *others = tensors
    yield "no gradient", lambda: function(*tensors)
    yield "gradient", lambda: function(*[t.clone().requires_grad_() for t in tensors])
    yield "jvp", lambda: torch.func.jvp(lambda x: function(x, *others), (x,), (torch.ones_like(x),))
    yield "vmap", lambda: torch.vmap(lambda x: function(x, *others))(x[None])


@pytest.mark.parametrize("name", OPS)
def test_one_dtype_for_all(name: str) -> None:
    count, function = OPS[name]
    wrong = []
    for dtypes in itertools.product(DTYPES, repeat=count):
        tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(SHAPES, dtypes)]
        for path, call in paths(function, tensors):
            try:
                call()
                said = ""
            except RuntimeError as error:
                said = str(error)
            refused = said.startswith(name.split()[0] + ": ") and said.endswith(f"allowed: the dtype of input, {dtypes[0]}")
            if refused is (len(set(dtypes)) == 1) or bool(said) is not refused:
                wrong.append((dtypes, path, said))
    assert not wrong
