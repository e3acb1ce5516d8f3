"""The main kernels with their warps and programs in an order drawn by a seed: the same results, and no deadlock."""

from __future__ import annotations

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops.testing import ContractMode
from tests.ptx.main_kernels import cases

FIRST = ("softmax_fwd_packed", "layer_norm_bwd_one_pass", "linear_fwd_pointer_sm80")  # in `make test`


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    marks = () if name in FIRST else (pytest.mark.slow,)
    return marks if cases()[name].compiles else (*marks, pytest.mark.skip(reason="Triton compiles clusters from 3.8 on"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in cases()])
def test_results_do_not_depend_on_the_schedule(name: str) -> None:
    results = []
    for seed in (None, 1) if name in FIRST else (None, 1, 2, 3):
        with cases()[name].ready() as (gpu, call), ContractMode():
            gpu.seed = seed
            result = call()
            results.append([t for t in (result if isinstance(result, tuple) else (result,)) if t is not None])
            assert gpu.launches
    assert results[0]
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
