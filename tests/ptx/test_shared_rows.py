"""Rows that wait in shared memory, in kernels written in Gluon, as compiled: what they compute, that they read once, that they wait."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops import fused_layernorm, fused_softmax
from fused_ops._runtime import settings
from fused_ops.kernels.config import SHARED_COLUMNS
from fused_ops.kernels.softmax.softmax_shared import EDGES_BWD, placement
from fused_ops.testing import ContractMode, forget_plans
from fused_ops.testing.ptx.gpu import Launch, altered, device
from fused_ops.testing.ptx.knowledge import MemoryFaultError
from tests.ptx.conflicts import hold_to_banks
from tests.ptx.row_loops import SeveralTurns

ROWS = 4  # for two programs
THREADS = 512
EDGES = 2 * 2 * 32 * (THREADS // 32)  # bytes of the edges of a row of each of two tensors, which every warp may read
BF16, FP16 = torch.bfloat16, torch.float16


def softmax(x: Tensor) -> list[Launch]:
    """The launches of forward and backward over x's last dimension, each held to its contract."""
    x = x.detach().requires_grad_()
    with device(90, sms=2) as gpu, ContractMode() as mode:
        y = fused_softmax(x)
        y.backward(torch.randn(x.shape).to(x.dtype))
    assert len(mode.checked) == 2
    return gpu.launches


def layer_norm(x: Tensor, affine: bool, bias: bool = True, dtype: torch.dtype | None = None) -> list[Launch]:
    """The launches of the backward over x's last dimension, held to its contract."""
    N = x.shape[-1]
    x = x.detach().requires_grad_()
    w, b = torch.randn(2, N).to(dtype or x.dtype)
    parameters = (w.requires_grad_(), b.requires_grad_() if bias else None) if affine else (None, None)
    with device(90, sms=2), ContractMode():
        y = fused_layernorm(x, (N,), *parameters)
    with device(90, sms=2) as gpu, ContractMode() as mode:
        y.backward(torch.randn(x.shape).to(x.dtype))
    assert len(mode.checked) == 1
    return gpu.launches


def only(launches: list[Launch], name: str) -> Launch:
    """The launch of a kernel, which ContractMode makes twice."""
    first, again = (launch for launch in launches if launch.kernel == name)
    assert first.programs == again.programs == 2
    return first


def read_once(launch: Launch, tensors: int, x: Tensor, extra: int = 0) -> None:
    """So many tensors like x were read, and no more than extra bytes."""
    nbytes = tensors * x.numel() * x.element_size()
    assert nbytes <= launch.traffic.load_bytes <= nbytes + extra
    hold_to_banks([launch])


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


LENGTHS = [(114696, BF16), slow(65544, BF16), slow(131072, BF16), slow(65544, FP16), slow(131072, FP16)]


@SeveralTurns("softmax_fwd_shared_kernel")
@pytest.mark.parametrize(("N", "dtype"), LENGTHS)
def test_softmax(N: int, dtype: torch.dtype) -> None:
    """One chunk more than registers hold, one chunk in registers, four; one row has -inf in all but its last columns."""
    x = torch.randn(ROWS, N).mul_(3).to(dtype)
    x[1, :-3] = -math.inf
    with device(90, sms=2) as gpu, ContractMode() as mode, torch.no_grad():
        fused_softmax(x)
    assert len(mode.checked) == 1
    read_once(only(gpu.launches, "softmax_fwd_shared_kernel"), 1, x)


@SeveralTurns("softmax_bwd_shared_kernel")
@pytest.mark.parametrize("N", [slow(32776), 50257, slow(EDGES_BWD - 1), slow(57352), 65536])
def test_softmax_backward(N: int) -> None:
    """Whole vectors and rows that start anywhere; dy in shared memory alone, and partly in registers."""
    x = torch.randn(ROWS, N).mul_(3).to(torch.bfloat16)
    read_once(only(softmax(x), "softmax_bwd_shared_kernel"), 2, x, ROWS * EDGES)


@SeveralTurns("layer_norm_bwd_shared_kernel")
@pytest.mark.parametrize(
    ("N", "affine", "bias", "dtype"),
    [
        (8200, True, True, None), slow(16384, True, True, None), slow(8200, True, False, None),
        slow(16384, True, True, torch.float32), slow(8200, False, False, None),
    ],
)  # fmt: skip
def test_layer_norm_backward(N: int, affine: bool, bias: bool, dtype: torch.dtype | None) -> None:
    x = torch.randn(ROWS, N).add_(1).to(torch.bfloat16)
    launch = only(layer_norm(x, affine, bias, dtype), "layer_norm_bwd_shared_kernel")
    weight = 4 if dtype else 2
    read_once(launch, 2, x, 2 * N * weight * affine + ROWS * 2 * 4 * THREADS)  # mean and rstd, by each thread


def test_padded_rows_wait_too_and_others_do_not() -> None:
    """A row stride of whole vectors; then addresses and strides for which no thread can copy 16 bytes."""
    N = 32800
    whole = torch.randn(3, N + 8).to(torch.bfloat16)[:, :N]
    at_an_odd_address = torch.randn(3 * N + 1).to(torch.bfloat16)[1:].view(3, N)
    names = []
    for dy, y in ((whole, whole), (at_an_odd_address, whole), (whole, at_an_odd_address), (whole.float(), whole.float())):
        with device(90, sms=2) as gpu:
            torch.ops.fused_ops.softmax_bwd(dy, y, 1, y.dtype)
        names += [launch.kernel for launch in gpu.launches]
    assert ["_shared_" in name for name in names] == [True, False, False, False]


def test_a_nan_or_an_infinity_makes_its_row_nan() -> None:
    x = torch.randn(4, 65544).to(torch.bfloat16)
    x[0, 5], x[1, -1], x[2] = math.nan, math.inf, -math.inf
    with device(90, sms=2) as gpu:
        y = fused_softmax(x)
    assert [launch.kernel for launch in gpu.launches] == ["softmax_fwd_shared_kernel"]
    assert y.isnan().all(1).tolist() == [True, True, True, False]
    assert not y[3].isnan().any()


CALLS: dict[str, Callable[[], Any]] = {
    "softmax_fwd": lambda: softmax(torch.randn(3, 65544).to(torch.bfloat16)),
    "softmax_bwd": lambda: softmax(torch.randn(3, 32776).to(torch.bfloat16)),
    "layer_norm_bwd": lambda: layer_norm(torch.randn(3, 8200).to(torch.bfloat16), True),
}


@pytest.mark.parametrize("name", SHARED_COLUMNS)
def test_the_wait_for_the_copies_is_needed(name: str) -> None:
    def without(ptx: str) -> str:
        changed, count = re.subn(r"cp\.async\.wait_group\s+\d+\s*;", "", ptx)
        return changed if count and f"{name}_shared_kernel" in ptx else ptx

    with pytest.raises(MemoryFaultError), altered(without):
        CALLS[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED_COLUMNS)
def test_the_variable_turns_them_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "GLUON", False)
    forget_plans()
    monkeypatch.setattr(settings, "CLUSTER", False)
    launches = [launch.kernel for launch in CALLS[name]()]
    assert any("_chunked_" in kernel for kernel in launches)
    assert not [kernel for kernel in launches if "_shared_" in kernel]


def test_no_column_is_left_without_a_place() -> None:
    """Every number of columns: all of a row is somewhere, and shared memory has room for it."""
    for name, rows in (("softmax_fwd", 1), ("softmax_bwd", 2)):
        least, most = SHARED_COLUMNS[name]
        for N in range(least + 1, most + 1, 7):
            options = placement(N, rows)
            chunk, shared, held = (options[key] for key in ("BLOCK_N", "SHARED", "HELD"))
            assert (shared + held - 1) * chunk < N <= (shared + held) * chunk
            assert 2 * chunk * (rows * shared + (rows - 1) * held) <= 232448 - 2048
            assert 0 <= held <= 4
