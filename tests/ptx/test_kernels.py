"""The kernels as Triton compiled them, executed without a GPU: held to the contract, and to the bytes that they may move.

Of the kernels that Triton's interpreter runs, this tests what it cannot: layouts, reductions over warps, inline assembly,
bfloat16 products, descriptors, barriers, and what the compiler made of all of it. Each launch is checked for accesses
outside its tensors, misaligned ones and races (memory.py), and asynchronous copies and products for waits that lack (hopper.py).
The programs of kernels that loop over rows or tiles take several of them (row_loops.py), and no launch has more bank conflicts
than its kernel may have (conflicts.py).
"""

from __future__ import annotations

import math
import re
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY, fused_gated_linear, fused_linear, fused_mlp, fused_softmax
from fused_ops._runtime.compiled import Planned
from fused_ops.kernels.config import MatmulConfig, next_power_of_2
from fused_ops.kernels.linear import linear_config
from fused_ops.ops.linear import matmul_plan
from fused_ops.ops.linear.matmul_gated import product_sum
from fused_ops.ops.linear.matmul_plan import forced_config
from fused_ops.testing import ContractMode, Op
from tests.contract import TRAINED, cases, hold_to_contract, leaves, sample_of

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops.testing.ptx.gpu import Device, altered, device
from tests.ptx.conflicts import hold_to_banks
from tests.ptx.row_loops import LOOPS, SeveralTurns

FEW_ROWS = 3
MOST_PROGRAMS = 4  # of a row backward on one SM
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def has_backward(op: Op, N: int) -> bool:
    """Whether test_rows runs the backward over N columns."""
    return MOST_BACKWARD.get(op.name, MOST_ELSE) >= N


def row_loops(op: Op, N: int) -> list[str]:
    """The kernels that loop over rows in the backward over N columns that test_rows runs."""
    return [name for name in LOOPS if name == f"{op.name}_bwd_kernel"] if has_backward(op, N) else []


def number_of_rows(op: Op, N: int) -> int:
    """Two tiles a program, and a row; a tile has up to 2048 elements of rows of up to 256 columns, and else one row."""
    tile = 2048 // next_power_of_2(N) if N <= 256 else 1
    return 2 * MOST_PROGRAMS * tile + 1 if row_loops(op, N) else FEW_ROWS


def rows(M: int, N: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """(M, N) whose rows start 16-byte aligned where N allows it, at an odd stride, or one element off."""
    if layout == "odd_stride":
        return torch.randn(M, N + 3 - N % 2).to(dtype)[:, :N]
    flat = torch.randn(M * N + 1).to(dtype)
    return (flat[1:] if layout == "offset" else flat[:-1]).view(M, N)


def run(op: Op, x: Tensor, arch: int) -> Device:
    """A row op, forward and backward, for arch, within the contract."""
    (_, *others), kwargs = op.bench.make("cpu", tuple(x.shape), x.dtype, None)
    args, wanted = leaves((x, *others))
    looping = row_loops(op, x.shape[1])
    several = SeveralTurns(*looping) if looping else nullcontext()
    with several, device(arch, sms=1) as gpu, ContractMode() as mode:
        y = op.public(*args, **kwargs)
        backward = has_backward(op, x.shape[1])
        if backward:
            torch.autograd.grad(y, wanted, torch.randn(x.shape).to(x.dtype))
    assert len(mode.checked) == 1 + backward
    hold_to_banks(gpu.launches)
    return gpu


MOST_BACKWARD, MOST_ELSE = {"softmax": 70001}, 8192  # columns; norms' chunked backwards run for long here: in a sample alone
POINTS = [  # N of `make test`, then of `make slow`
    (90, BF16, "contiguous", (197, 512, 1000, 16384, 65536, 70001), (64, 256, 4096, 8192, 32768, 50257)),
    (90, BF16, "odd_stride", (197,), (1000, 4097)),
    (90, BF16, "offset", (1000,), (198, 16384)),
    (90, FP16, "contiguous", (), (197, 50257, 65536)),
    (90, FP32, "contiguous", (1001,), (31, 197, 1000, 16384, 40001)),
    (80, BF16, "contiguous", (197, 32768), (1000, 50257)),
    (80, FP32, "contiguous", (), (513, 16384)),
]
LATER = (pytest.mark.slow,)


def _points() -> list[Any]:
    return [
        pytest.param(arch, dtype, layout, N, id=f"sm{arch}-{str(dtype)[6:]}-{layout}-{N}", marks=marks)
        for arch, dtype, layout, first, later in POINTS
        for marks, lengths in (((), first), (LATER, later))
        for N in lengths
    ]


@pytest.mark.parametrize(("arch", "dtype", "layout", "N"), _points())
@pytest.mark.parametrize("op", [op for op in REGISTRY.values() if op.tuned], ids=lambda op: op.name)
def test_rows(op: Op, arch: int, dtype: torch.dtype, layout: str, N: int) -> None:
    """Every variant of the row kernels; x, dy and y are read from memory once and each result is written once."""
    M = number_of_rows(op, N)
    gpu = run(op, rows(M, N, dtype, layout), arch)
    sectors = M * N * dtype.itemsize / 32
    for launch in gpu.launches:
        tensors = 1 if "_fwd" in launch.kernel else 2
        if launch.kernel == "column_sum_kernel":
            continue
        partial = 0 if "_fwd" in launch.kernel else 2 * launch.programs  # rows of dw, db
        slack = 2 * M + (2 + partial) * math.ceil(N * 4 / 32) * (op.name != "softmax") + 8  # edges; w, b, dw, db
        assert tensors * sectors <= launch.traffic.load_once <= tensors * (sectors + M) + slack, launch
        assert sectors <= launch.traffic.store_once <= sectors + slack, launch
        if (
            op.name == "softmax"
            and "chunked" not in launch.kernel
            and layout == "contiguous"
            and (N > 512 or dtype is not FP32)
        ):
            source = launch.compiled.src
            wide = source.constants[(source.fn.arg_names.index("VEC"),)] > 1
            edges = 0 if N % 8 == 0 or not wide else 4 * tensors * M * launch.compiled.metadata.num_warps  # read by each warp
            again = 1.1 if wide else 1.6  # coalesced; the 64 bytes of a warp's 16-bit accesses lie in up to three sectors
            assert launch.traffic.load_sectors <= again * launch.traffic.load_once + edges, launch


@pytest.mark.parametrize("N", [65536, 32768])
def test_packed_rows_of_infinities(N: int) -> None:
    """What tests/gpu asks of the packed kernel too, whose rounding is one machine instruction."""
    x = torch.randn(4, N).to(BF16)
    x[0, : N // 2] = -math.inf
    x[1] = -math.inf
    x[2, 5] = math.inf
    x[3, -1] = math.nan
    with device(90) as gpu, ContractMode():
        fused_softmax(x)
    assert gpu.launches[0].kernel == "softmax_fwd_packed_kernel"
    assert "cvt.rn.bf16x2.f32" in gpu.launches[0].compiled.asm["ptx"]


def _samples() -> list[Any]:
    """bf16 on sm_90 all, on sm_80 the products, and in fp32 the other ops without what is long here. Of them `make test` runs the
    first samples, or of an architecture or dtype that repeats the others the basic one; `make slow` runs all."""
    found = []
    for arch, dtype in ((90, BF16), (80, BF16), (90, FP32)):
        for case in cases([dtype]):
            op, sample = sample_of(*case.values)
            if (arch, dtype) != (90, BF16) and op.roles.multiplies == (dtype is FP32):
                continue
            if dtype is FP32 and "slow" in sample.tags:
                continue
            first = ("first" if (arch, dtype) == (90, BF16) else "basic") in sample.tags
            found.append(pytest.param(arch, *case.values, id=f"sm{arch}-{case.id}", marks=() if first else LATER))
    return found


@pytest.mark.parametrize(("arch", "name", "dtype", "index"), _samples())
def test_samples(arch: int, name: str, dtype: torch.dtype, index: int) -> None:
    with device(arch) as gpu:
        hold_to_contract(*sample_of(name, dtype, index))
    hold_to_banks(gpu.launches)


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["first", "others"])
@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in TRAINED])
def test_samples_of_ops_without_gradients(name: str, first: bool) -> None:
    spec = REGISTRY[name]
    launches = 0
    for sample in spec.samples("cpu", BF16):
        if ("first" in sample.tags) == first:
            with device(90) as gpu, ContractMode() as mode:
                spec.public(*sample.args, **sample.kwargs)
            assert mode.checked, sample.name
            hold_to_banks(gpu.launches)
            launches += len(gpu.launches)
    assert launches


def operands(M: int, N: int, K: int, dtype: torch.dtype, x_t: bool = False, w_t: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(K, M).to(dtype).t() if x_t else torch.randn(M, K).to(dtype)
    w = torch.randn(K, N).mul(K**-0.5).to(dtype).t() if w_t else torch.randn(N, K).mul(K**-0.5).to(dtype)
    return x, w, torch.randn(N).to(dtype)


def tiles(use: str) -> list[Any]:
    """The tiles of a use; all but the smallest are slow."""
    found = sorted((t.block_m * t.block_n, f"{t.block_m}x{t.block_n}x{t.block_k}", t) for t, _ in linear_config._TMA_TILES[use])
    return [pytest.param(t, id=name, marks=LATER if i else ()) for i, (_, name, t) in enumerate(found)]


@pytest.mark.parametrize("tile", tiles("fwd"))
@SeveralTurns("linear_fwd_tma_kernel")
def test_tma_tiles(tile: MatmulConfig) -> None:
    """More tiles than programs, each overhanging in M, N and K, more steps of K than stages; the pre-activation stored."""
    x, w, b = operands(tile.block_m + 40, tile.block_n + 24, 4 * tile.block_k + 8, BF16)
    x.requires_grad_()
    with forced_config(tile), device(90, sms=2 // tile.programs) as gpu, ContractMode() as mode:
        fused_linear(x, w, b, "gelu")
    assert mode.checked
    launch = gpu.launches[0]
    assert (launch.kernel, launch.programs) == ("linear_fwd_tma_kernel", 2)
    ptx = launch.compiled.asm["ptx"]
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16", ptx)
    assert launch.traffic.widths["store", "tma"] == 2 * x.shape[0] * w.shape[0] * 2  # y and the pre-activation, once each
    assert ("store", "32") not in launch.traffic.widths
    hold_to_banks(gpu.launches)


@pytest.mark.parametrize(("x_t", "w_t"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP16, marks=LATER)], ids=["bf16", "fp16"])
def test_tma_reads_transposed_operands(x_t: bool, w_t: bool, dtype: torch.dtype) -> None:
    tile = linear_config._TMA_TILES["fwd"][2][0]
    x, w, b = operands(104, 136, 200, dtype, x_t, w_t)
    with SeveralTurns("linear_fwd_tma_kernel"), forced_config(tile), device(90, sms=1) as gpu, ContractMode():
        fused_linear(x, w, b, "silu")
    hold_to_banks(gpu.launches)


@pytest.mark.parametrize("tile", tiles("gated"))
@SeveralTurns("gated_linear_fwd_tma_kernel")
def test_gated_tma_tiles(tile: MatmulConfig) -> None:
    x, gate, _ = operands(tile.block_m + 40, tile.block_n + 24, 3 * tile.block_k + 8, BF16)
    with forced_config(tile), device(90, sms=2 // tile.programs) as gpu, ContractMode():
        fused_gated_linear(x, gate, gate.flip(0), "silu")
    hold_to_banks(gpu.launches)


@pytest.mark.parametrize("tile", tiles("fwd"))
@SeveralTurns("product_sum_tma_kernel")
def test_sums_of_tma_products(tile: MatmulConfig) -> None:
    """x's gradient in a gated linear."""
    a, b, _ = operands(tile.block_m + 40, tile.block_n + 24, tile.block_k + 8, BF16, w_t=True)
    c, d = a.flip(0), b.flip(0)
    out = torch.empty(a.shape[0], b.shape[0], dtype=BF16)
    with forced_config(tile), device(90, sms=2 // tile.programs) as gpu:
        product_sum(a, b.t(), c, d.t(), out)
    exact = a.double() @ b.double().t() + c.double() @ d.double().t()
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)
    hold_to_banks(gpu.launches)


@pytest.mark.parametrize("tile", tiles("dact"))
@SeveralTurns("linear_dact_tma_kernel")
def test_mlp_backward_tma_tiles(tile: MatmulConfig) -> None:
    """dact and dbias in the epilogue of a persistent kernel."""
    x, w1, b1 = operands(tile.block_m + 40, tile.block_n + 24, 72, BF16)
    w2 = torch.randn(40, w1.shape[0]).mul(w1.shape[0] ** -0.5).to(BF16)
    x.requires_grad_(), b1.requires_grad_()
    with forced_config(tile), device(90, sms=2 // tile.programs) as gpu, ContractMode():
        fused_mlp(x, w1, b1, w2, None, "gelu").backward(torch.randn(x.shape[0], 40).to(BF16))
    hold_to_banks(gpu.launches)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=LATER)])
def test_split_k_and_pointer_kernels(arch: int) -> None:
    x, w, b = operands(16, 200, 1100, BF16)
    for config in (linear_config.linear_config(16, 200, 1100, 2, (9, 0), 4, "any"), MatmulConfig(64, 64, 32, 4, 4)):
        with forced_config(config), device(arch) as gpu, ContractMode():
            fused_linear(x, w, b, "relu")
        assert gpu.launches[0].kernel == ("linear_split_k_kernel" if config.kind == "split_k" else "linear_fwd_kernel")
        assert "mma.sync" in gpu.launches[0].compiled.asm["ptx"] or "wgmma" in gpu.launches[0].compiled.asm["ptx"]
        hold_to_banks(gpu.launches)


@pytest.mark.parametrize("arch", [pytest.param(80, marks=LATER), 90])
def test_tf32_where_torch_allows_it(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 products are exact in fp32, and with TF32 allowed those of 11-bit significands, which nothing else here computes."""
    x, w, _ = operands(70, 72, 96, FP32)
    exact = torch.relu(x.double() @ w.double().t())
    errors = {}
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(matmul_plan, "precision_of", lambda *_, precision=precision: precision)
        with device(arch) as gpu:
            y = fused_linear(x, w, None, "relu")
        assert ("tf32" in gpu.launches[0].compiled.asm["ptx"]) == (precision == "tf32")
        hold_to_banks(gpu.launches)
        errors[precision] = float((y - exact).abs().max())
    assert errors["ieee"] < 1e-5 < 1e-4 < errors["tf32"] < 4e-3


WAITS = {
    "copy_in": (r"waitLoop:.*?bra\.uni waitLoop;", "mov.pred complete, -1;", r"multiplies what a TMA copy writes"),
    "product": (
        r"wgmma\.wait_group\.sync\.aligned \d;",
        "wgmma.wait_group.sync.aligned 7;",
        "writes what a wgmma of warp 0 reads",
    ),
    "copy_out": (
        r"cp\.async\.bulk\.wait_group\.read\s+0\s*;",
        "cp.async.bulk.wait_group.read 7;",
        "writes what a bulk copy of thread 0 reads",
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_wait_of_the_persistent_kernel_is_needed(name: str) -> None:
    """Without waiting for copies into shared memory, for products or for copies out of it, the machine finds the kernel wrong."""
    pattern, instead, found = WAITS[name]
    x, w, b = operands(264, 280, 264, BF16)

    def change(ptx: str) -> str:
        changed, count = re.subn(pattern, instead, ptx, flags=re.S)
        assert count
        return changed

    tile = linear_config._TMA_TILES["fwd"][1][0]
    with pytest.raises(AssertionError, match=found), forced_config(tile), altered(change), device(90, sms=2), ContractMode():
        fused_linear(x, w, b, "gelu")


def test_a_kernel_that_writes_too_far_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher lies about N: the kernel reads and writes past the end."""
    from fused_ops.ops.softmax import softmax_launch
    from fused_ops.testing.ptx.knowledge import MemoryFaultError

    plan = softmax_launch._fwd_plan

    def wrong(*arguments: Any) -> Planned:
        right = plan(*arguments)
        options = {**right.options, "N": right.options["N"] + 8}
        return Planned(right.device, right.kernel, options, block=right.block, step=right.step, takes_rows=right.takes_rows)

    monkeypatch.setattr(softmax_launch, "_fwd_plan", wrong)
    with pytest.raises(MemoryFaultError, match=r"which has|another program touches"), device(90):
        fused_softmax(rows(FEW_ROWS, 1000, BF16))


def test_configurations_are_those_of_the_architecture() -> None:
    names = {}
    for arch in (80, 90):
        with device(arch) as gpu:
            fused_softmax(rows(FEW_ROWS, 65536, BF16))
        names[arch] = gpu.launches[0].kernel
    assert names == {80: "softmax_fwd_chunked_kernel", 90: "softmax_fwd_packed_kernel"}
