"""What chooses the kernel of a matmul and its configuration: how its operands lie in memory.

Every product is x @ w^T with x (M, K) and w (N, K) of any strides. No operand is ever copied: what TMA cannot describe,
the pointer kernels read. (Leading dimensions of an input that do not collapse into one M are the one copy, made before,
by `rows_of`.) Plans are kept for what chooses them, launches for what they are: many numbers of rows have one configuration.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._runtime.compiled import Planned
from ..._runtime.device import FP8, interpreting, properties_of
from ..._runtime.launch_path import triton_version
from ..._runtime.notices import warn_once
from ..._runtime.plans import forget_plans, may_be_refused
from ..._runtime.rows import at_vectors
from .dispatch import CUBLAS_ONLY

if TYPE_CHECKING:
    from ...kernels.config import MatmulConfig

FENCES_COPIES = (3, 7)  # the first Triton that fences wgmma from the tiles that cp.async copied
FP8_CHUNK = 128  # products that Hopper's fp8 tensor cores may sum in their own, narrower, accumulator
LARGEST_TILE = 64  # rows: M beyond SMALL_ROWS is looked at in tiles of 64 rows and of twice as many
SMALL_ROWS, LEAST_ROWS = 64, 16  # up to SMALL_ROWS a tile holds all rows, and at least LEAST_ROWS

_forced: MatmulConfig | None = None
_no_warp_specialization: set[Any] = set()  # (kernel, configuration) that does not compile with it


@functools.cache
def kernels() -> Any:
    """The kernel modules, imported when first needed."""
    from ...kernels import config
    from ...kernels.linear import linear, linear_bwd, linear_config, linear_gated, linear_gated_bwd, linear_splitk, linear_tma

    return SimpleNamespace(
        config=config, fwd=linear, bwd=linear_bwd, choose=linear_config.linear_config, gated=linear_gated,
        gated_bwd=linear_gated_bwd, split_k=linear_splitk, tma=linear_tma,
    )  # fmt: skip


@contextlib.contextmanager
def forced_config(config: MatmulConfig) -> Iterator[None]:
    """While active, every matmul that can run with this configuration does. For tuning and tests; not thread-safe."""
    global _forced
    before, _forced = _forced, config
    forget_plans()
    try:
        yield
    finally:
        _forced = before
        forget_plans()


def forced() -> MatmulConfig | None:
    """The configuration of the active forced_config."""
    return _forced


class Operands(NamedTuple):
    """How a product's operands lie in memory: x (M, K) and weights (N, K), by their strides.

    rows: M as far as a configuration looks at it, in whole tiles; exactly M where x is stored transposed, for then M is in its
    strides too. vectors: `at_vectors` of all. precision: of fp32 products.
    """

    rows: int
    N: int
    K: int
    x: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    vectors: bool | None
    cuda: bool
    precision: str
    device: int

    def of_any_rows(self) -> Operands:
        """The same for every number of rows that has the same configuration."""
        return self._replace(rows=LEAST_ROWS) if self.x[1] == 1 else self

    def access(self) -> str:
        """How the operands can be read: "tma", "aligned" (128-bit loads), or "any"."""
        if self.vectors is False:
            return "any"
        found = [_layout(self.rows, self.K, self.x, self.itemsize)]
        found += [_layout(self.N, self.K, strides, self.itemsize) for strides in self.weights]
        if None in found:
            return "any"
        if (
            self.vectors is None or self.itemsize == 4 or self.N * max(self.itemsize, 2) % 16 or self.K == 0
        ):  # y's rows are aligned too
            return "aligned"
        transposed = [layout[0] for layout in found if layout]
        same = len(set(transposed[1:])) == 1  # a gated linear's weights
        return "tma" if same and (self.itemsize == 2 or not any(transposed)) else "aligned"  # fp8 tensor cores read along K

    def layouts(self) -> tuple[tuple[bool, int], ...]:
        """(whether it is stored transposed, its row stride) of x and of each weight, where access is "tma"."""
        found = [_layout(self.rows, self.K, self.x, self.itemsize)]
        found += [_layout(self.N, self.K, strides, self.itemsize) for strides in self.weights]
        return tuple(layout for layout in found if layout)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def config(self, use: str) -> MatmulConfig:
        """The configuration for a use of linear_config: the forced one where it can run."""
        access = self.access()
        if (
            _forced is not None
            and (_forced.kind != "tma" or access == "tma")
            and (_forced.kind != "split_k" or use in ("fwd", "fp8"))
        ):
            return _forced
        config: MatmulConfig = kernels().choose(
            self.rows, self.N, self.K, self.itemsize, *properties_of(self.device), access, use
        )
        return config

    def stages(self, config: MatmulConfig) -> int:
        """How many tiles of K are on their way at once.

        One, where Triton (before 3.7) leaves out the fence.proxy.async that Hopper's products need after asynchronous copies.
        """
        by_wgmma = config.block_m >= 64 and config.kind != "tma" and (self.itemsize < 4 or self.precision == "tf32")
        if by_wgmma and properties_of(self.device)[0][0] == 9 and triton_version()[1] < FENCES_COPIES:
            return 1
        return config.num_stages

    def options(self, config: MatmulConfig, group: bool = True) -> dict[str, Any]:
        """The keyword arguments that all matmul kernels take."""
        options = {
            "N": self.N, "K": self.K, "PRECISION": self.precision,
            "WIDEN": interpreting() and self.dtype in (torch.bfloat16, FP8),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "num_warps": config.num_warps, "num_stages": self.stages(config),
        }  # fmt: skip
        return options | {"GROUP_M": config.group_m} if group else options

    def planned(
        self, kernel: Any, config: MatmulConfig, options: dict[str, Any], again: Callable[[], Any], across: int = 1
    ) -> Planned:
        """The launch of a kernel over the tiles of (M, N), persistent where it reads by TMA descriptors.

        A warp-specialised configuration that does not compile runs without warp specialisation from then on, with a warning
        once. again: plans the launch once more, then. across: launches of all tiles, of parts of K.
        """
        across *= -(-self.N // config.block_n)
        if config.kind != "tma":
            return Planned(self.device, kernel, options, block=config.block_m, across=across)
        specialized = config.warp_specialize and (kernel, config) not in _no_warp_specialization
        options = {**options, "SUBTILES": config.subtiles, "WARP_SPECIALIZE": specialized}
        most = properties_of(self.device)[1] * config.programs
        planned = Planned(self.device, kernel, options, block=config.block_m, across=across, most=most)
        if not specialized:
            return planned

        def instead(error: Exception) -> Planned:
            _no_warp_specialization.add((kernel, config))
            _say_dropped(kernel, config, error)
            forget_plans()
            made = again()
            return made if isinstance(made, Planned) else made.main  # type: ignore[no-any-return]

        return may_be_refused(planned, instead)


def _say_dropped(kernel: Any, config: MatmulConfig, error: Exception) -> None:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} num_warps={config.num_warps} num_stages={config.num_stages}"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    reason = f"{tile} runs without warp specialisation, with which it does not compile: {type(error).__name__}: {first}"
    warn_once(kernel.fn.__name__, reason)


Key = tuple[Any, ...]  # the fields of Operands: a tuple is made faster


def operands(x: Tensor, M: int, strides: tuple[int, ...], *weights: Tensor, read: Tensor | None = None) -> Key:
    """The Operands of x, M rows of these strides, and weights (N, K), as a tuple. read: a tensor that the epilogue reads."""
    N, K = weights[0].shape
    dtype, cuda = x.dtype, x.is_cuda
    rows = M
    if strides[1] == 1:
        rows = (
            -(-M // LARGEST_TILE) * LARGEST_TILE
            if M > SMALL_ROWS
            else 1 << (M - 1).bit_length()
            if M > LEAST_ROWS
            else LEAST_ROWS
        )
    return (
        rows, N, K, strides, tuple([w.stride() for w in weights]) if len(weights) > 1 else (weights[0].stride(),), dtype,
        at_vectors(x, *weights) if read is None else at_vectors(x, *weights, read), cuda,
        "ieee" if dtype is not torch.float32 else precision_of(dtype, cuda), x.get_device(),
    )  # fmt: skip


def reduce_plan(
    N: int, S: int, part_dtype: torch.dtype, b_dtype: torch.dtype | None, out_dtype: torch.dtype, device: int, **epilogue: Any
) -> Planned:
    """The launch that adds S partial products and applies the epilogue: linear_reduce_kernel, over M * N elements."""
    options = {"N": N, "S": S, **epilogue, "BLOCK": kernels().split_k.reduce_block(part_dtype.itemsize), "num_warps": 4}
    return Planned(device, kernels().split_k.linear_reduce_kernel, options)


def fp32_on_cublas(x: Tensor) -> bool:
    """Whether cuBLAS computes products of x, and kernels of ours only what surrounds them: fp32 on a GPU."""
    return x.is_cuda and x.dtype in CUBLAS_ONLY and _forced is None


def _layout(rows: int, cols: int, strides: tuple[int, ...], itemsize: int) -> tuple[bool, int] | None:
    """(whether a matrix is stored transposed, its row stride) where TMA's stride rules hold, else None."""
    for transposed in (False, True):
        inner, outer, length = (0, 1, rows) if transposed else (1, 0, cols)
        if strides[inner] == 1 and strides[outer] * itemsize % 16 == 0 and strides[outer] >= length:
            return transposed, strides[outer]
    return None


def precision_of(dtype: torch.dtype, cuda: bool) -> str:
    """How products are multiplied: "tf32" where torch's setting, old or new, says so for fp32 on a GPU; else "ieee"."""
    return "tf32" if cuda and dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
