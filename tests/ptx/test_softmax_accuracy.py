"""Softmax's exponentials over the axes that they may err along, in every kernel, while approximate instructions err as documented."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops import fused_softmax
from fused_ops.kernels.config import SHARED_COLUMNS, RowConfig
from fused_ops.testing import ContractMode, forced
from fused_ops.testing.ptx.approximate import errors
from fused_ops.testing.ptx.gpu import device
from tests.ptx.main_kernels import CLUSTERS, INNER, kernel_names

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROW, LONG = 249, 1016  # columns of kernels over rows, and of clusters
KERNELS = {  # kernel: (configuration, shape, dimension, dtypes)
    "softmax_fwd_kernel": (RowConfig(4, 256, 4), (1, ROW), -1, (FP32, BF16, FP16)),
    "softmax_fwd_chunked_kernel": (RowConfig(1, 64, 2, "chunked"), (1, ROW), -1, (FP32, BF16, FP16)),
    "softmax_fwd_packed_kernel": (RowConfig(1, 256, 4, "packed"), (1, ROW), -1, (BF16, FP16)),
    "softmax_fwd_shared_kernel": (None, (1, SHARED_COLUMNS["softmax_fwd"][0] + 8), -1, (BF16, FP16)),
    "softmax_fwd_cluster_kernel": (RowConfig(1, 1024, 1, num_ctas=8), (1, LONG), -1, (FP32,)),
    "softmax_fwd_inner_kernel": (None, INNER["one_pass"], 0, (FP32, BF16)),
    "softmax_fwd_inner_kernel chunked": (None, INNER["chunked"], 0, (FP32, BF16)),
}
CASES = [
    pytest.param(kernel, dtype, marks=pytest.mark.slow if "shared" in kernel else ())
    for kernel, (_, _, _, dtypes) in KERNELS.items()
    for dtype in dtypes
]


def axes(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Inputs by name: what is far from 0, far apart, as large as floats are, and neighbours where floats lie 2^78 apart."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    largest = torch.finfo(dtype).max
    for offset in (0.0, 300.0, 1e4, 1e6):
        if offset < largest:
            yield f"offset {offset:g}", noise + offset
            yield f"offset {-offset:g}", noise - offset
    for scale in (30.0, 1e3):
        yield f"scale {scale:g}", noise * scale
    yield "equal and largest", torch.full(shape, 0.9 * largest)
    yield "largest and least", torch.where(noise > 0, 0.9 * largest, -0.9 * largest)
    if dtype is not FP16:
        yield "neighbours", 2.0**101 * (1 + torch.round(noise) * torch.finfo(dtype).eps)
    yield "minus infinities", torch.where(noise > 1.5, noise, -math.inf)


@pytest.mark.parametrize(("kernel", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_every_kernel_along_every_axis(kernel: str, dtype: torch.dtype) -> None:
    config, shape, dim, _ = KERNELS[kernel]
    if config is not None and config.num_ctas > 1 and not CLUSTERS:
        pytest.skip("clusters need Triton 3.8 or later")
    names = set()
    for name, x in axes(shape, dtype):
        for sign in (-1, 1):
            with forced("softmax_fwd", config), device(90, sms=1) as gpu, ContractMode() as mode, errors(None, sign):
                fused_softmax(x.to(dtype), dim)
            assert mode.checked, name
            names |= {launch.kernel for launch in gpu.launches}
    assert names == {kernel.split()[0]}


def test_all_forward_kernels_are_here() -> None:
    assert {name.split()[0] for name in KERNELS} == {name for name in kernel_names() if name.startswith("softmax_fwd")}
