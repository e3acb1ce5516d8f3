"""A short row's result has the same bits whatever other rows there are: sums over it are taken in one order for every M."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from fused_ops import fused_layernorm, fused_layernorm_fp8, fused_rmsnorm, fused_softmax
from fused_ops.ops.norm.layer_norm_launch import layer_norm_bwd_launch, layer_norm_launch
from fused_ops.ops.norm.rms_norm_launch import rms_norm_bwd_launch, rms_norm_launch
from fused_ops.ops.softmax.softmax_launch import softmax_bwd_launch, softmax_launch
from fused_ops.testing.ptx.gpu import OPTIONS, Device, Launch, device, specialised

SMS = 132
OPS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": fused_softmax,
    "layer_norm": lambda x: fused_layernorm(x, x.shape[-1:]),
    "rms_norm": lambda x: fused_rmsnorm(x, x.shape[-1:]),
}
COLUMNS = (7, 64, 128, 197, 256, 512)


def layouts(ttgir: str) -> tuple[tuple[str, ...], ...]:
    """Of each sum or maximum along a row, in order: (elements a thread, threads a warp, warps) that share the row.

    A sum of two, as of a row's two edges, has one order in any layout.
    """
    named = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>$", ttgir, re.MULTILINE))
    found = []
    for axis, shape, encoding in re.findall(
        r'"tt\.reduce"\(.*?\) <\{axis = (\d).*?^ *\}\) : \(tensor<((?:\d+x)+)\w+, (\S+)>\) ->', ttgir, re.DOTALL | re.MULTILINE
    ):
        if axis != "0" and int(shape.split("x")[int(axis)]) > 2:
            lists = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[([\d, ]+)\]", named[encoding])
            found.append(tuple(each.split(", ")[int(axis)] for each in lists))
    assert len(found) >= 1
    return tuple(found)


def results(op: str, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What the operator's kernels give for each row: outputs, statistics, and dx."""
    if op == "softmax":
        y = softmax_launch(x, 1, torch.float32)
        return {"y": y, "dx": softmax_bwd_launch(dy.float(), y, 1, torch.float32)}
    weight = torch.linspace(0.5, 2, x.shape[1])
    if op == "rms_norm":
        y, rstd = rms_norm_launch(x, weight, 1e-5)
        return {"y": y, "rstd": rstd, "dx": rms_norm_bwd_launch(dy, x, weight, rstd, True, True)[0]}
    y, mean, rstd = layer_norm_launch(x, weight, weight, 1e-5)
    dx = layer_norm_bwd_launch(dy, x, weight, mean, rstd, True, True, True, torch.float32)[0]
    return {"y": y, "mean": mean, "rstd": rstd, "dx": dx}


def height(launch: Launch) -> tuple[str, int]:
    """(kernel, BLOCK_M)."""
    source = launch.compiled.src
    return launch.kernel, source.constants[(source.fn.arg_names.index("BLOCK_M"),)]


class Layouts:
    """In place of `Device.run`: compiles what would run, once a configuration, and keeps the layouts of each kernel."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.found: dict[str, set[Any]] = {}

    def __call__(self, kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
        names = [name for name in kernel.arg_names if name not in kwargs]
        values = {**dict(zip(names, args)), **{k: v for k, v in kwargs.items() if k not in OPTIONS}}
        if "BLOCK_M" in values and (key := (kernel.__name__, values["BLOCK_M"], options["num_warps"])) not in self.seen:
            self.seen.add(key)
            source = triton.compiler.ASTSource(kernel, *specialised(kernel, values))
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**options, "enable_fp_fusion": True})
            self.found.setdefault(kernel.__name__, set()).add(layouts(compiled.asm["ttgir"]))
        return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("N", COLUMNS)
def test_the_layout_along_a_row_is_one_for_any_number_of_rows(
    N: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch chooses by the power of two that M comes up to: these are all the choices for up to 2^17 rows."""
    compiled = Layouts()
    monkeypatch.setattr(Device, "run", lambda _, *launch: compiled(*launch))
    with device(90, SMS):
        for bits in range(18):
            x = torch.empty(1 << bits, N, dtype=dtype, requires_grad=True)
            for op in OPS.values():
                op(x).backward(torch.empty_like(x))
            fused_layernorm_fp8(x.detach(), (N,))
    assert len(compiled.found) == 7
    assert N in (7, 512) or len(compiled.seen) > len(compiled.found)  # several heights of tiles were compared
    for kernel, found in compiled.found.items():
        assert len(found) == 1, (kernel, found)


@pytest.mark.parametrize("N", [7, 64, 197, 256])
@pytest.mark.parametrize("op", OPS)
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(op: str, N: int) -> None:
    """fp32, whose bits show any other order of a sum; of 16 bits the statistics, and softmax in fp32. On one SM, so that 200 rows
    and one take the tallest tiles and the least."""
    torch.manual_seed(0)
    batch = 3 * torch.randn(200, N) + 1
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = batch.to(dtype), torch.randn(200, N).to(dtype)
        with device(90, sms=1) as gpu:
            together = results(op, x, dy)
            for row in (0, 56, 192):  # where rows have edges, those that begin as the first
                alone = results(op, x[row : row + 1].clone(), dy[row : row + 1].clone())
                for name, value in alone.items():
                    assert torch.equal(value[0], together[name][row]), (dtype, row, name)
        if N > 7:
            heights = {height(launch) for launch in gpu.launches if launch.kernel != "column_sum_kernel"}
            assert len(heights) > len({kernel for kernel, _ in heights})
