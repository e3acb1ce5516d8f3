"""The kernels of fused_layernorm_fp8 in the interpreter: every sample, and the conversion to e4m3 that is done in arithmetic."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fused_ops import REGISTRY, fused_layernorm_fp8
from fused_ops.kernels.norm.layer_norm_fp8 import _e4m3_bits
from fused_ops.testing import ContractMode, recorded
from tests.ops.test_layer_norm_fp8 import test_contract_catches_a_scale_of_another_row as test_contract
from tests.ops.test_layer_norm_fp8 import test_feeds_an_fp8_product as test_product
from tests.ops.test_layer_norm_fp8 import test_one_step_from_quantising_the_fp32_layer_norm as test_one_step
from tests.ops.test_layer_norm_fp8 import test_several_normalised_dimensions_and_an_int as test_dimensions

__all__ = ["test_contract", "test_dimensions", "test_one_step", "test_product"]  # on the kernels too


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.usefixtures("poisoned_memory")
def test_samples(dtype: torch.dtype) -> None:
    with recorded(made=True) as launches:
        for sample in REGISTRY["layer_norm_fp8"].samples("cpu", dtype):
            with ContractMode() as mode:
                fused_layernorm_fp8(*sample.args)
            assert mode.checked, sample.name
    assert {kernel.__name__ for kernel, *_ in launches} == {"layer_norm_fp8_kernel", "layer_norm_fp8_chunked_kernel"}


@triton.jit
def _convert(x_ptr, q_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0)
    tl.store(q_ptr + offsets, _e4m3_bits(x, False), mask=offsets < N)


def test_conversion_is_torch_s() -> None:
    """All e4m3 numbers, the middles between neighbours and the fp32 numbers beside them, and random ones of every size."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2  # exact in fp32
    beside = [middles.nextafter(torch.tensor(end)) for end in (0.0, 1e3)]
    spread = torch.randn(5000) * 2.0 ** torch.randint(-16, 8, (5000,))
    x = torch.cat([numbers, middles, *beside, spread.clamp(-448, 448), torch.tensor([448.00003, 1e-30, 1e-44])])
    x = torch.cat([x, -x, torch.tensor([float("nan"), -float("nan")])])
    q = torch.empty(x.shape, dtype=torch.uint8)
    _convert[(-(-x.numel() // 256),)](x, q, x.numel(), BLOCK=256)
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(q.view(torch.float8_e4m3fn).float().nan_to_num(1e4), expected.float().nan_to_num(1e4))
    assert torch.equal((q >> 7)[:-2], (expected.view(torch.uint8) >> 7)[:-2])  # -0 too


def test_offsets_beyond_int32() -> None:
    apart = 2**30
    x = torch.empty(2 * apart + 8, dtype=torch.float16).as_strided((3, 8), (apart, 1))
    x.copy_(torch.randn(3, 8))
    for ours, theirs in zip(fused_layernorm_fp8(x, [8]), fused_layernorm_fp8(x.clone(), [8])):
        assert torch.equal(ours.float(), theirs.float())
