"""Shapes, layouts and dtypes that nobody thought of, drawn by hypothesis, each held to the numerics contract."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import Sample
from tests.contract import hold_to_contract

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SETTINGS = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def strided(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape with steps, an offset, a permutation of its strides, or an expanded dimension."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    skip = draw(st.integers(0, 3))
    padded = [shape[d] * steps[d] + skip for d in order]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    base = torch.randn(padded, generator=generator).to(dtype)
    inverse = [list(order).index(d) for d in range(len(shape))]
    view = base.permute(inverse)
    view = view[tuple(slice(skip, skip + shape[d] * steps[d], steps[d]) for d in range(len(shape)))]
    expandable = [d for d, size in enumerate(shape) if size > 1]
    if expandable and draw(st.booleans()) and draw(st.booleans()):
        d = draw(st.sampled_from(expandable))
        view = view.narrow(d, 0, 1).expand(shape)
    assert view.shape == shape
    return view


@SETTINGS
@given(st.data())
def test_softmax(data: Any) -> None:
    shape = tuple(
        data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: torch.Size(s).numel() < 5000))
    )
    dtype = data.draw(DTYPES)
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = data.draw(strided(shape, dtype))
    hold_to_contract(REGISTRY["softmax"], Sample("drawn", (x * data.draw(st.sampled_from([1.0, 30.0])), dim)))
    hold_to_contract(REGISTRY["softmax"], Sample("drawn", (x, dim)))


@SETTINGS
@given(st.data())
def test_layer_norm(data: Any) -> None:
    lead = data.draw(st.lists(st.integers(1, 12), min_size=0, max_size=3))
    tail = data.draw(st.lists(st.integers(2, 30), min_size=1, max_size=2))
    dtype = data.draw(DTYPES)
    parameter_dtype = data.draw(st.sampled_from([dtype, torch.float32]))
    x = data.draw(strided((*lead, *tail), dtype))
    parameters = [
        data.draw(strided(tuple(tail), parameter_dtype)) if data.draw(st.booleans()) else None for _ in ("weight", "bias")
    ]
    hold_to_contract(REGISTRY["layer_norm"], Sample("drawn", (x, tuple(tail), *parameters)))


@SETTINGS
@given(st.data())
def test_linear(data: Any) -> None:
    K, N = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 80))
    lead = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    dtype = data.draw(DTYPES)
    x, w = data.draw(strided((*lead, K), dtype)), data.draw(strided((N, K), dtype))
    b = data.draw(strided((N,), dtype)) if data.draw(st.booleans()) else None
    activation = data.draw(
        st.sampled_from([None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2"])
    )
    hold_to_contract(REGISTRY["linear"], Sample("drawn", (x, w, b, activation)))
