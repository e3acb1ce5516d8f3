"""Row lengths that choose each variant of the row kernels, first of all those that nothing but a GPU can execute: rows kept
packed (long), loads from an aligned window (odd lengths and odd strides), chunked rows, and whole-row tiles. Clusters, which
no chooser takes unasked, are forced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops._runtime import clusters as clusters_module
from fused_ops._runtime import tables
from fused_ops.kernels.config import RowConfig, next_power_of_2
from fused_ops.testing import KERNELS, ContractMode, Expected, assert_within_contract, recorded
from tests.gpu.hold import DTYPE_IDS, DTYPES, HELD_BYTES, hold

pytestmark = pytest.mark.gpu

LENGTHS = (65536, 50257, 32768, 197, 128256, 16384, 16383, 40961, 4096, 8191, 257, 64)
ROWS = 264  # two an SM of an H100: every program of a persistent grid has work
LAYOUTS = ("contiguous", "odd_stride", "offset")


def rows(N: int, dtype: torch.dtype, layout: str) -> Tensor:
    """(ROWS, N) whose rows start 16-byte aligned, or at an odd stride, or one element off."""
    if layout == "contiguous":
        return torch.randn(ROWS, N, device="cuda").to(dtype)
    if layout == "odd_stride":
        return torch.randn(ROWS, N + 3 - N % 2, device="cuda").to(dtype)[:, :N]
    return torch.randn(ROWS * N + 1, device="cuda").to(dtype)[1:].view(ROWS, N)


def arguments(op: str, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of a row op for x; None for another op."""
    N = x.shape[-1]
    w, b = torch.randn(2, N, device=x.device).to(x.dtype)
    return {
        "softmax": ((x,), {"dim": -1}),
        "layer_norm": ((x, (N,), w, b), {}),
    }.get(op)


def points() -> list[Any]:
    """(dtype, layout, N): bf16 in every length and layout, the other dtypes where the bytes of a row choose otherwise."""
    bf16 = [(0, layout, N) for layout in LAYOUTS for N in (LENGTHS if layout == "contiguous" else LENGTHS[:8])]
    others = [(dtype, "contiguous", N) for dtype in (1, 2) for N in LENGTHS[:5]]
    return [
        pytest.param(DTYPES[d], layout, N, id=f"{DTYPE_IDS[d]}-{layout}-{N}", marks=memory(N))
        for d, layout, N in (*bf16, *others)
    ]


def memory(N: int) -> Any:
    return pytest.mark.memory(ROWS * N * HELD_BYTES + (1 << 29))


@pytest.mark.parametrize(("dtype", "layout", "N"), points())
@pytest.mark.parametrize("op", [name for name in REGISTRY if arguments(name, torch.empty(1, 1)) is not None])
def test_row_length(op: str, dtype: torch.dtype, layout: str, N: int) -> None:
    args, kwargs = arguments(op, rows(N, dtype, layout)) or ((), {})
    hold(REGISTRY[op], args, kwargs)


CLUSTERED = [name for name, tuned in KERNELS.items() if tuned.clustered]


@pytest.fixture
def clusters() -> Iterator[Callable[[int, int, str], None]]:
    """clusters(N, num_ctas, variant): rows of N run as clusters in every kernel that can, until the test ends."""
    if not clusters_module.can_cluster(torch.cuda.current_device()):
        pytest.skip("clusters need a GPU of compute capability 9 or 10 and Triton 3.8 or later")

    def force(N: int, num_ctas: int, variant: str) -> None:
        block_n = next_power_of_2(N)
        for kernel in CLUSTERED if variant == "one_pass" else ("softmax_fwd", "softmax_bwd"):
            per_thread = 16 if kernel.endswith("bwd") and variant == "one_pass" else 32
            num_warps = min(32, max(4, block_n // (num_ctas * 32 * per_thread)))
            tables.force(kernel, RowConfig(1, block_n, num_warps, variant, num_ctas=num_ctas))

    yield force
    for kernel in CLUSTERED:
        tables.force(kernel, None)


CLUSTERS = [
    pytest.param(
        DTYPES[dtype], variant, num_ctas, layout, N, id=f"{DTYPE_IDS[dtype]}-{variant}-{num_ctas}-{layout}-{N}", marks=memory(N)
    )
    for dtype, variant in ((0, "packed"), (1, "packed"), (0, "one_pass"), (2, "one_pass"))
    for num_ctas, layout, N in (
        (8, "contiguous", 128256), (8, "contiguous", 131071), (8, "odd_stride", 100000), (8, "offset", 65536),
        (4, "contiguous", 65536), (2, "contiguous", 16384), (2, "contiguous", 8191), (8, "contiguous", 4097),
    )
    if variant != "packed" or layout != "odd_stride"  # the launcher never asks for packed kernels there
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "variant", "num_ctas", "layout", "N"), CLUSTERS)
def test_clusters(clusters: Any, dtype: torch.dtype, variant: str, num_ctas: int, layout: str, N: int) -> None:
    clusters(N, num_ctas, variant)
    spec = REGISTRY["softmax"]
    x, dy = rows(N, dtype, layout), rows(N, dtype, "contiguous")
    with recorded() as launches:
        spec.fwd(x, 1, None)
        spec.bwd(dy, torch.empty_like(dy), 1, dtype)
    assert [options.get("num_ctas") for _, _, options in launches] == [num_ctas, num_ctas]
    with ContractMode():
        spec.bwd(dy, spec.fwd(x, 1, None), 1, dtype)
    hold(spec, (x,), {"dim": -1})
    if variant == "one_pass":
        w, b = torch.randn(2, N, device="cuda").to(dtype)
        hold(REGISTRY["layer_norm"], (x, (N,), w, b), {})


@pytest.mark.parametrize("variant", ["one_pass", "packed"])
def test_clusters_with_infinities(clusters: Any, variant: str) -> None:
    """Rows whose every part but one is -inf, all -inf, with one NaN in the last part, with one +inf in the first; the same
    bits on every run."""
    clusters(131072, 8, variant)
    x = torch.randn(64, 131072, device="cuda").to(torch.bfloat16)
    for part in range(8):
        x[part] = float("-inf")
        x[part, part * 16384 + 5 : part * 16384 + 99] = 1.0
    x[8], x[9, -1], x[10, 0] = float("-inf"), float("nan"), float("inf")
    y = REGISTRY["softmax"].fwd(x, 1, None)
    (expected,) = REGISTRY["softmax"].bound(x, 1, None)
    assert_within_contract(y, expected)
    for _ in range(20):
        again = REGISTRY["softmax"].fwd(x, 1, None)
        assert torch.equal(again.view(torch.int16), y.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=DTYPE_IDS[:2])
def test_packed_rows_with_infinities(dtype: torch.dtype) -> None:
    """A long row whose first half is -inf, one that is all -inf (NaN, as torch gives), and one with a single +inf."""
    x = torch.randn(4, 65536, device="cuda").to(dtype)
    x[0, :32768] = float("-inf")
    x[1] = float("-inf")
    x[2, 5] = float("inf")
    y = REGISTRY["softmax"].public(x, -1)
    exact = F.softmax(x.double(), -1)
    distance = (x.double() - x.double().amax(-1, keepdim=True)).abs().nan_to_num(0.0, 0.0)
    assert_within_contract(y, Expected(exact, (exact * (256 + distance)).nan_to_num(0.0, 0.0)))
