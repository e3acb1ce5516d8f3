"""What only a GPU can show: offsets beyond 2^31, grids beyond 65535, TF32, other streams and devices, memory growth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from tests.gpu.hold import DTYPE_IDS, DTYPES

pytestmark = pytest.mark.gpu


@pytest.mark.memory(9 << 30)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_row_offsets_beyond_int32(dtype: torch.dtype) -> None:
    """Three rows 2^30 elements apart: the last begins at element 2^31, where a 32-bit offset would wrap."""
    storage = torch.empty(2**31 + 8, dtype=dtype, device="cuda")
    x = storage.as_strided((3, 8), (2**30, 1))
    x.copy_(torch.randn(3, 8))
    w, b = torch.randn(2, 8, device="cuda").to(dtype)
    dense = x.clone()
    torch.testing.assert_close(fused_ops.fused_softmax(x, -1), fused_ops.fused_softmax(dense, -1), rtol=0, atol=0)
    torch.testing.assert_close(
        fused_ops.fused_layernorm(x, (8,), w, b), fused_ops.fused_layernorm(dense, (8,), w, b), rtol=0, atol=0
    )


def test_more_rows_than_a_grid_axis() -> None:
    """200 000 rows: more than grids y and z hold, and far more than programs in a persistent grid."""
    x = torch.randn(200_000, 33, device="cuda", requires_grad=True)
    y = fused_ops.fused_layernorm(x, (33,))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(y, F.layer_norm(x, (33,)), rtol=1e-5, atol=1e-5)
    assert dx.abs().max() < 1e-4  # the gradient of a row's sum, which is constant
    torch.testing.assert_close(fused_ops.fused_softmax(x, -1), F.softmax(x, -1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tf32", [False, True])
def test_linear_follows_the_tf32_setting(tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    x, w = torch.randn(512, 2048, device="cuda"), torch.randn(256, 2048, device="cuda")
    exact = x.double() @ w.double().t()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        y = fused_ops.fused_linear(x, w, None, "relu")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    error = ((y - exact.relu()).norm() / exact.relu().norm()).item()
    assert (5e-5 < error < 2e-3) if tf32 else error < 2e-6, f"relative error {error:.3g} with allow_tf32={tf32}"


def test_another_stream() -> None:
    """Work queued on a side stream is seen by the kernels launched there."""
    side = torch.cuda.Stream()
    x = torch.zeros(4096, 1024, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        x.normal_()
        y = fused_ops.fused_softmax(x, -1)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(y, F.softmax(x, -1), rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_on_a_device_that_is_not_current() -> None:
    x = torch.randn(8, 100, device="cuda:1")
    torch.testing.assert_close(fused_ops.fused_softmax(x, -1), F.softmax(x, -1), rtol=1e-5, atol=1e-7)


def test_memory_does_not_grow() -> None:
    """A thousand training steps of each op end with as many bytes allocated as after the first."""
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    w = torch.randn(256, 256, device="cuda", requires_grad=True)
    b = torch.randn(256, device="cuda", requires_grad=True)

    def step() -> None:
        y = fused_ops.fused_softmax(fused_ops.fused_linear(fused_ops.fused_layernorm(x, (256,), b, b), w, b, "gelu"), -1)
        torch.autograd.grad(y.sum(), (x, w, b))

    step()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
