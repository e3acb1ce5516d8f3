"""Every kernel on every sample, forward and backward, held to the numerics contract; and what only memory shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY, fused_layernorm, fused_linear, fused_softmax
from fused_ops.testing import watch_launches
from tests.contract import cases, hold_to_contract, sample_of

GUARD = 64  # elements on each side of an output
SENTINEL = 12345.0


def _case(case: Any) -> Any:
    """Slow: samples that take long here; and in fp16, which the kernels take as they take bf16, upcast after each load, all
    but the first samples."""
    sample = sample_of(*case.values)[1]
    slow = "slow" in sample.tags or (case.values[1] is torch.float16 and "first" not in sample.tags)
    return pytest.param(*case.values, id=case.id, marks=(pytest.mark.slow,) if slow else ())


CASES = [_case(case) for case in cases([torch.float32, torch.float16, torch.bfloat16])]


@pytest.mark.parametrize(("name", "dtype", "index"), CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_within_contract(name: str, dtype: torch.dtype, index: int) -> None:
    hold_to_contract(*sample_of(name, dtype, index))


@pytest.fixture
def red_zones(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """torch.empty gives the middle of a larger buffer, NaN inside and a sentinel around it; yields the buffers."""
    buffers: list[Tensor] = []
    empty = torch.empty

    def guarded(*shape: Any, **kwargs: Any) -> Tensor:
        unguarded = empty(*shape, **kwargs)
        if not unguarded.is_floating_point() or unguarded.device.type != "cpu":
            return unguarded
        buffer = torch.full((unguarded.numel() + 2 * GUARD,), SENTINEL, dtype=unguarded.dtype)
        buffers.append(buffer)
        inner = buffer.as_strided(unguarded.shape, unguarded.stride(), GUARD)
        return inner.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", guarded)
    yield buffers
    monkeypatch.undo()
    assert buffers
    for buffer in buffers:
        assert (buffer[:GUARD] == SENTINEL).all(), "a kernel wrote before an output"
        assert (buffer[-GUARD:] == SENTINEL).all(), "a kernel wrote behind an output"


@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (7, 130), (2, 3, 33), (5, 1000)])
def test_no_write_outside_outputs(red_zones: list[Tensor], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    w = torch.randn(shape[-1], requires_grad=True)
    b = torch.randn(shape[-1], requires_grad=True)
    m = torch.randn(17, shape[-1], requires_grad=True)
    for out in (
        fused_layernorm(x, shape[-1:], w, b),
        fused_softmax(x),
        fused_softmax(x, 0),
        fused_linear(x, m, m[:, 0], "gelu"),
    ):
        assert not out.isnan().any()
        out.sum().backward()
    for leaf in (x, w, b, m):
        assert leaf.grad is not None
        assert not leaf.grad.isnan().any()


def test_offsets_beyond_int32() -> None:
    """Rows 2^30 elements apart over an untouched 4 GiB buffer: an int32 offset would wrap."""
    apart = 2**30
    buffer = torch.empty(2 * apart + 8, dtype=torch.float16)
    x = buffer.as_strided((3, 8), (apart, 1))
    x.copy_(torch.randn(3, 8))
    torch.testing.assert_close(fused_softmax(x), x.float().softmax(-1).half(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(fused_softmax(x.t(), 0).t(), x.float().softmax(-1).half(), atol=1e-3, rtol=1e-3)
    expected = torch.nn.functional.layer_norm(x.float(), (8,)).half()
    torch.testing.assert_close(fused_layernorm(x, (8,)), expected, atol=2e-3, rtol=2e-3)
    w = torch.randn(5, 8).half()
    torch.testing.assert_close(fused_linear(x, w), (x.float() @ w.float().t()).half(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(fused_linear(w, x), (w.float() @ x.float().t()).half(), atol=2e-3, rtol=2e-3)


def test_half_precision_products_accumulate_in_fp32() -> None:
    """A sum of 20,000 ones: fp16 or bf16 accumulation would stop at 2048 or 256."""
    for dtype in (torch.float16, torch.bfloat16):
        ones = torch.ones(2, 20000, dtype=dtype)
        assert (fused_linear(ones, ones) == torch.tensor(20000.0, dtype=dtype)).all()


def test_more_rows_than_a_grid_dimension_holds() -> None:
    x = torch.randn(70001, 3)
    torch.testing.assert_close(fused_softmax(x), x.softmax(-1))
    torch.testing.assert_close(fused_softmax(x.t().contiguous(), 0).t(), x.softmax(-1))


def test_row_of_2_to_the_20() -> None:
    x = torch.randn(1, 2**20 + 3)
    torch.testing.assert_close(fused_softmax(x), x.softmax(-1))
    torch.testing.assert_close(
        fused_layernorm(x, x.shape[1:]), torch.nn.functional.layer_norm(x, x.shape[1:]), atol=1e-5, rtol=1e-5
    )


def test_kernels_really_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, an ATen fallback would pass every other test of this file."""
    ran: list[str] = []

    def spy(kernel: Any, *_: Any) -> bool:
        ran.append(kernel.fn.__name__)
        return False

    watch_launches(spy)
    x = torch.randn(5, 9, requires_grad=True)
    w = torch.randn(7, 9, requires_grad=True)
    fused_layernorm(fused_softmax(fused_linear(x, w, w[:, 0], "gelu"), -1), (7,), w[:, 1], w[:, 2]).sum().backward()
    assert set(ran) >= {
        "linear_fwd_kernel", "linear_act_bwd_kernel", "softmax_fwd_kernel", "softmax_bwd_kernel", "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel", "column_sum_kernel",
    }  # fmt: skip


def test_unneeded_gradients_are_not_computed() -> None:
    spec = REGISTRY["layer_norm"]
    x, dy = torch.randn(4, 6), torch.randn(4, 6)
    _, mean, rstd = spec.fwd(x, None, None, 1e-5)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        grads = spec.bwd(dy, x, None, mean, rstd, *needs, None)
        assert [g.numel() > 0 for g in grads] == list(needs)
