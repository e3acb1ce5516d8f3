"""The benchmark cases that test_4_contract.py leaves out for their size, at that size, on some rows of every output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops.testing import Case, Op
from tests.gpu.sampled import hold_sampled
from tests.gpu.test_4_contract import fits_whole

pytestmark = pytest.mark.gpu
MOST_BYTES = 5 << 30  # of a row op's case: more shows nothing new
OTHER_DTYPES = ("linear-llama3_8b_gelu_tanh-float16", "linear-llama3_8b_gelu-float32", "softmax-gpt2_vocabulary-float32")


def memory_sampled(spec: Op, case: Case) -> int:
    """The most bytes of device memory that one case takes, estimated: what is moved, and weights and some rows in fp64."""
    forward, backward = spec.bench.bytes(case)
    if not spec.roles.multiplies:
        return 3 * max(forward, backward) + (2 << 30)
    _, N, K = case.shape
    weights = {"gated_linear": 2, "mlp": 2}.get(spec.name, 1) * N * K
    return 2 * (forward + backward) + weights * 8 * 4 + (2 << 30)


def cases() -> list[Any]:
    """Every such case in bf16 and fp8, and a few in other dtypes."""
    found = []
    for name, spec in REGISTRY.items():
        for case in spec.bench.cases():
            label = f"{name}-{case.name}-{str(case.dtype)[6:]}"
            wanted = case.dtype in (torch.bfloat16, torch.float8_e4m3fn) or label in OTHER_DTYPES
            small = spec.roles.multiplies or max(spec.bench.bytes(case)) <= MOST_BYTES
            if wanted and small and not fits_whole(spec, case):
                found.append(pytest.param(name, case, id=label, marks=pytest.mark.memory(memory_sampled(spec, case))))
    return found


@pytest.mark.parametrize(("name", "case"), cases())
def test_sampled_rows(name: str, case: Case) -> None:
    hold_sampled(REGISTRY[name], *case.make("cuda"))
    torch.cuda.synchronize()
