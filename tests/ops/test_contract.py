"""The ATen path of every op in every dtype, held to the numerics contract; and proof that the contract catches wrong kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_ops import REGISTRY
from fused_ops.testing import INTERPRET, contract_error
from tests.contract import cases, hold_to_contract, sample_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

pytestmark = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")


@pytest.mark.parametrize(("name", "dtype", "index"), cases(DTYPES))
@pytest.mark.usefixtures("poisoned_memory")
def test_within_contract(name: str, dtype: torch.dtype, index: int) -> None:
    hold_to_contract(*sample_of(name, dtype, index))


def _worst(out: torch.Tensor, *bound_args: object) -> float:
    return contract_error(out, REGISTRY["layer_norm"].bound(*bound_args)[0]).max().item()


def test_contract_catches_half_precision_statistics() -> None:
    x = (torch.randn(8, 1024) + 3).to(torch.bfloat16)
    mean = x.mean(-1, keepdim=True)  # rounded to bf16
    centred = x.float() - mean.float()
    wrong = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)).to(torch.bfloat16)
    right = F.layer_norm(x.float(), (1024,)).to(torch.bfloat16)
    assert _worst(right, x, None, None, 1e-5) <= 1
    assert _worst(wrong, x, None, None, 1e-5) > 10


def test_contract_catches_half_precision_accumulation() -> None:
    x, dy = torch.randn(2000, 8).to(torch.bfloat16), torch.randn(2000, 8).to(torch.bfloat16)
    mean, rstd = torch.zeros(2000), torch.ones(2000)
    bound = REGISTRY["layer_norm"].raw[1].bound(dy, x, None, mean, rstd, False, True, True, None)
    wrong = torch.zeros(8, dtype=torch.bfloat16)
    for row in dy:
        wrong += row
    assert contract_error(wrong, bound[2]).max() > 10
    assert contract_error(dy.float().sum(0).bfloat16(), bound[2]).max() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_contract_catches_misplaced_specials(value: float) -> None:
    x = torch.randn(3, 5)
    (expected,) = REGISTRY["softmax"].bound(x, -1, None)
    out = x.softmax(-1)
    assert contract_error(out, expected).max() <= 1
    out[1, 2] = value
    error = contract_error(out, expected)
    assert error[1, 2] == float("inf")
    assert (error > 1).sum() == 1


def test_contract_catches_a_wrong_element() -> None:
    x = torch.randn(3, 5)
    (expected,) = REGISTRY["softmax"].bound(x, -1, None)
    out = x.softmax(-1)
    out[2, 4] *= 1 + 1e-4
    assert (contract_error(out, expected) > 1).nonzero().tolist() == [[2, 4]]
