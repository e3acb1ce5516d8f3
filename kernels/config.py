"""Launch configurations: frozen dataclasses, and the small arithmetic that every chooser of one shares.

A configuration is a pure function of (sizes, itemsize, capability, SM count). Nothing here touches a GPU, so that the
ahead-of-time audit compiles exactly what a launch would.
"""

from __future__ import annotations

from dataclasses import dataclass


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) for integers, b > 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n <= 1."""
    return 1 << max(0, n - 1).bit_length()


CLUSTER_CTAS = 8  # programs of a cluster: as many as every GPU with clusters takes
CLUSTER_CAPABILITIES = (9, 10)  # major; 12 has clusters as well, but nothing here is compiled or reckoned for them
CLUSTER_TRITON = (3, 8)  # reductions over a cluster do not compile before


L2_BYTES = {(9, 0): 50_000_000, (10, 0): 126_000_000, (12, 0): 96_000_000}
"""By compute capability; of 12.0, an RTX 5090. Not of 8.0, where a softmax that prefetches chunks of fp32 spills on Triton 3.9."""
L2_SHARE = 0.6  # of it, what the rows between two passes may take


SHARED_COLUMNS = {"softmax_fwd": (65536, 131072), "softmax_bwd": (32768, 65536), "layer_norm_bwd": (8192, 16384)}
"""Kernel -> (least, most): 16-bit rows of more columns than least, for which registers do not suffice, and of up to most may wait
in shared memory. For the backward of layer norm the sums for dw and db leave no registers beyond most."""


def has_clusters(capability: tuple[int, int], triton: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs clusters that this version of Triton compiles."""
    return capability[0] in CLUSTER_CAPABILITIES and triton >= CLUSTER_TRITON


@dataclass(frozen=True)
class RowConfig:
    """How a row kernel is launched: BLOCK_M rows of BLOCK_N columns a program.

    variant: "one_pass" holds whole rows in registers as fp32; "packed" holds one row of 16-bit floats in pairs; "shared" holds
    one row of 16-bit floats in shared memory (shared_rows.py); "chunked" takes a row in several BLOCK_N. num_ctas: with more than 1, so many programs, a cluster, share one row of
    BLOCK_N columns, each with its part in registers (has_clusters).
    """

    block_m: int
    block_n: int
    num_warps: int
    variant: str = "one_pass"
    num_stages: int = 1
    num_ctas: int = 1

    @property
    def chunked(self) -> bool:
        """Whether a row takes several blocks."""
        return self.variant == "chunked"


@dataclass(frozen=True)
class MatmulConfig:
    """How a matmul kernel is launched.

    kind: "pointer" (one tile a program, any strides), "tma" (persistent, tensor descriptors), or "split_k" (K in `splits`
    parts, then a reduction). group_m tile rows share an L2-resident band of columns. The TMA epilogue runs in `subtiles`
    column parts, to hold fewer registers. programs: of a persistent kernel, how many an SM holds at once, so that one's
    epilogue runs under another's products. warp_specialize is a request, dropped with a warning where it does not compile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    kind: str = "pointer"
    splits: int = 1
    subtiles: int = 1
    programs: int = 1
    warp_specialize: bool = False


def chunked_programs(capability: tuple[int, int], sms: int, row_bytes: int) -> int:
    """The programs of a persistent kernel that reads rows of row_bytes twice, such that L2 still has the second read's bytes.

    The rows at work take at most L2_SHARE of L2: two programs an SM, one, or a few less. 0, which stands for a program a row: where
    four programs an SM fit anyway, where L2 is not known, or where fewer than 5 of 8 SMs would be at work. A softmax issues 20
    instructions an element: for 4096 x 131072 in 16 bits 0.46 ms on 132 SMs at 3.2 warp instructions a clock, and memory takes
    0.7 ms. With fewer than 5/8 of the SMs the instructions would take longer than memory, and so would what L2 has lost.
    """
    fit = int(L2_SHARE * L2_BYTES.get(capability, 0)) // row_bytes
    if fit >= 4 * sms:
        return 0
    if fit >= sms:
        return sms * min(2, fit // sms)
    return fit if 8 * fit >= 5 * sms else 0


def rows_of_whole_vectors(block_n: int, num_warps: int, itemsize: int) -> int:
    """The least BLOCK_M for rows of block_n <= 512 columns in num_warps warps: a thread has whole 16-byte vectors of a row, or all.

    In smaller tiles a thread would have fewer neighbouring columns than in larger ones, so that a row's sum would be taken in
    another order, and its bits would depend on how many rows there are.
    """
    return max(num_warps, 32 * num_warps * (16 // itemsize) // block_n)


def rows_that_fill(M: int, block_m: int, sms: int, least: int = 1, programs_per_sm: int = 4) -> int:
    """Halve block_m until the grid has programs_per_sm programs an SM, so that a small M still uses the whole chip."""
    while block_m > least and cdiv(M, block_m) < programs_per_sm * sms:
        block_m //= 2
    return block_m
