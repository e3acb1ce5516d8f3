"""Kernels whose programs take several tiles of rows each, as compiled: what one tile leaves behind is the next one's."""

from __future__ import annotations

import re
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from fused_ops import REGISTRY, fused_softmax
from fused_ops._runtime.rows import column_sum
from fused_ops.kernels.config import RowConfig
from fused_ops.kernels.reduce import column_sum_blocks
from fused_ops.ops.linear.matmul import act_bwd
from fused_ops.ops.linear.matmul_gated import gate_bwd
from fused_ops.ops.softmax import softmax_launch
from fused_ops.testing import KERNELS, ContractMode, Op, forced
from fused_ops.testing.ptx.gpu import altered, device
from fused_ops.testing.ptx.knowledge import MemoryFaultError
from tests.contract import leaves
from tests.ptx import test_kernels  # noqa: F401  (its tests say which kernels they stand for)
from tests.ptx.conflicts import hold_to_banks
from tests.ptx.row_loops import LOOPS, TESTED, SeveralTurns

CONFIGS = {
    "one_pass": RowConfig(1, 512, 4),
    "chunked": RowConfig(2, 256, 4, "chunked"),
    "chunked_repeated": RowConfig(4, 128, 8, "chunked"),  # several warps hold each column, one of which writes it
}
OPS = [op for op in REGISTRY.values() if op.tuned and " v" in op.roles.inputs]


def kernel(op: Op, name: str) -> str:
    return "norm_bwd_chunked_columns_kernel" if CONFIGS[name].chunked else f"{op.name}_bwd_kernel"


def backward(op: Op, name: str, alone: bool = False) -> None:
    """A backward over 9 rows of 500 columns by as few programs as there can be, several strips of columns where it is chunked.

    The number of rows is no multiple of a program's rows. alone: the last gradient only.
    """
    config = CONFIGS[name]
    (x, *others), kwargs = op.bench.make("cpu", (9, 500), torch.float32, None)
    args, wanted = leaves((x, *others))
    for leaf in wanted[: len(wanted) - 1] if alone else []:
        leaf.requires_grad_(False)
    with (
        SeveralTurns(kernel(op, name)),
        forced(f"{op.name}_bwd", config),
        device(90, sms=1) as gpu,
        ContractMode() as mode,
    ):
        torch.autograd.grad(op.public(*args, **kwargs), wanted[-1:] if alone else wanted, torch.randn(x.shape))
    assert len(mode.checked) == 2
    hold_to_banks(gpu.launches)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_several_tiles(op: Op, name: str) -> None:
    assert CONFIGS[name].variant in KERNELS[f"{op.name}_bwd"].variants
    backward(op, name, alone=name == "chunked_repeated")


@SeveralTurns("linear_act_bwd_kernel")
@pytest.mark.parametrize(("columns", "dtype"), [(264, torch.float32), (272, torch.bfloat16)])
def test_an_activations_backward(columns: int, dtype: torch.dtype) -> None:
    """One program for each 128 columns, of 56 rows in four tiles; 16-bit vectors are copied while the tile before is computed."""
    dy, pre = torch.randn(2, 56, columns).to(dtype)
    with device(90, sms=1) as gpu:
        dpre, db = act_bwd(dy, pre, "silu", need_dpre=True, need_db=True)
    if dtype is torch.float32:
        hold_to_banks(gpu.launches)
    expected = torch.ops.aten.silu_backward(dy.float(), pre.float())
    torch.testing.assert_close((dpre, db), (expected.to(dtype), expected.sum(0).to(dtype)))


@SeveralTurns("gate_bwd_kernel")
def test_a_gates_backward() -> None:
    dy, g, u = torch.randn(3, 56, 264)
    with device(90, sms=1) as gpu:
        found = gate_bwd(dy, g, u, "silu", need_dbg=True, need_dbu=True)
    hold_to_banks(gpu.launches)
    dg, du = torch.ops.aten.silu_backward(dy * u, g), dy * torch.nn.functional.silu(g)
    torch.testing.assert_close(found, (dg, du, dg.sum(0), du.sum(0)))


@SeveralTurns("softmax_fwd_chunked_kernel")
@pytest.mark.parametrize("N", [1000, 1001])
def test_several_long_rows(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs take five rows of several chunks, the next chunk on its way; a row's maximum may not pass to the next."""
    monkeypatch.setattr(softmax_launch, "chunked_programs", lambda *_: 2)
    x = torch.randn(5, N).bfloat16() - 50 * torch.arange(5)[:, None]
    x[2] = float("-inf")
    with forced("softmax_fwd", RowConfig(1, 256, 4, "chunked")), device(90, sms=2) as gpu, ContractMode() as mode:
        fused_softmax(x.bfloat16())
    assert len(mode.checked) == 1
    assert gpu.launches[0].programs == 2
    hold_to_banks(gpu.launches)


@SeveralTurns("column_sum_kernel")
def test_more_partial_rows_than_a_step_takes() -> None:
    part = torch.randn(600, 40)
    with device(90) as gpu:
        total = column_sum(part, torch.float32)
    hold_to_banks(gpu.launches)
    torch.testing.assert_close(total, part.sum(0))


@pytest.mark.parametrize("P", [1, 7, 33, 100])
def test_a_tile_of_all_partial_rows(P: int) -> None:
    part = torch.randn(P, 300)
    with device(90) as gpu:
        total = column_sum(part, torch.bfloat16)
    hold_to_banks(gpu.launches)
    assert gpu.launches[0].programs == -(-300 // column_sum_blocks(P)[1])
    torch.testing.assert_close(total, part.sum(0).bfloat16())


def test_every_loop_over_rows_takes_several_turns_in_a_test() -> None:
    """A kernel of which no program of any test came to a second tile would hide what two of them get wrong."""
    assert {kernel(op, name) for op in OPS for name in CONFIGS} | TESTED == set(LOOPS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_barrier_at_the_head_of_a_loop_over_rows_is_needed(op: Op) -> None:
    """It keeps a warp from writing its part of the next tile's sum before all have read this tile's."""

    def without(ptx: str) -> str:
        if kernel(op, "one_pass") not in ptx:
            return ptx
        loop = next(
            label for label in re.finditer(r"^(\$\w+):", ptx, re.M) if re.search(rf"bra\S*\s+\{label[1]};", ptx[label.end() :])
        )
        changed, count = re.subn(r"bar\.sync\s+0;", "", ptx[loop.end() :], count=1)
        assert count
        return ptx[: loop.end()] + changed

    with pytest.raises(MemoryFaultError, match="and nothing orders the two"), altered(without):
        backward(op, "one_pass")
