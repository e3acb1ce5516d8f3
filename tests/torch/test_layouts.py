"""Sparse and MKL-DNN tensors in each argument's place: computed by torch's functions, or refused in words, whatever path dense
tensors would take."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import Op

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "compressed rows": lambda t: t.to_sparse_csr(),
    "MKL-DNN": lambda t: t.to_mkldnn(),
}


def dense(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    results = [result] if isinstance(result, Tensor) else list(result)
    return [(t if t.layout is torch.strided else t.to_dense()).float() for t in results]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items()])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_layout_is_torchs_or_refused(op: Op, requires_grad: bool) -> None:
    sample, tried = op.example("cpu", torch.float32), 0
    for i, given in enumerate(sample.args):
        for name, converted in LAYOUTS.items():
            args = [
                a.clone().requires_grad_() if requires_grad and op.trains and isinstance(a, Tensor) and j != i else a
                for j, a in enumerate(sample.args)
            ]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    args[i] = converted(given)
            except (AttributeError, IndexError, RuntimeError):  # no tensor, or none that torch has in this layout
                continue
            tried += 1
            try:
                result = op.public(*args, **sample.kwargs)
            except (RuntimeError, TypeError) as error:
                text = str(error)
                assert text.startswith(f"{op.public.__name__}: "), (i, name, text)
                assert len(text) < 400, (i, name, text)
                assert ", allowed: " in text, (i, name, text)
            else:
                for ours, theirs in zip(dense(result), dense(op.torch_fn(*args, **sample.kwargs)), strict=True):
                    torch.testing.assert_close(ours, theirs)
    assert tried > 0
