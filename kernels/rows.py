"""What the row kernels share: the aligned part of a row and its edges, and two 16-bit floats held as one int32.

Global memory moves fastest in 16-byte vectors from 16-byte addresses. A row of 50257 16-bit numbers starts at a multiple of 16
bytes only once in eight rows. Its aligned part is read and written in vectors; the at most VEC - 1 elements before it
and after it, its edges, are handled beside it as one small tile. Nothing outside the row is touched.
"""

from __future__ import annotations

import triton
import triton.language as tl

BF16_MINUS_INF_PAIR = tl.constexpr(-8323200)  # 0xff80ff80
FP16_MINUS_INF_PAIR = tl.constexpr(-67044352)  # 0xfc00fc00
LOG2_E = tl.constexpr(1.4426950408889634)  # 1 / ln 2


def row_vectors(N: int, itemsize: int, column_stride: int, row_strides: tuple[int, ...]) -> tuple[int, bool, bool]:
    """(VEC, EDGES, SAME): how a kernel accesses rows of N elements of at least itemsize bytes, with these strides.

    VEC: elements in one 16-byte access, or 1 where elements must move one by one. EDGES: whether rows may start at any
    address, so that elements lie before and after the aligned part. SAME: whether row i of every tensor starts equally far
    from a multiple of VEC.
    """
    vec = 16 // itemsize
    if column_stride != 1 or N < 4 * vec:
        return 1, False, False
    if N % vec == 0 and all(stride % vec == 0 for stride in row_strides):
        return vec, False, True
    if itemsize == 4 and N <= 512:  # a warp's 32-bit accesses fill whole lines, and edges would cost more registers
        return 1, False, False
    return vec, True, len({stride % vec for stride in row_strides}) == 1


def whole_vectors(N: int, itemsize: int, column_stride: int, row_strides: tuple[int, ...]) -> int:
    """VEC for kernels that cannot handle edges: 1 where rows have edges."""
    vec, edges, _ = row_vectors(N, itemsize, column_stride, row_strides)
    return 1 if edges else vec


def row_tiles(M: int, block_m: int, step: int) -> int:
    """How many tiles of block_m rows, each taking every step-th row (see tile_rows), cover M rows."""
    groups, rest = divmod(M, block_m * step)
    return groups * step + min(rest, step)


@triton.jit
def aligned(n, VEC: tl.constexpr):
    """n, a multiple of VEC, in a form from which every version of the compiler sees that it is one."""
    return n // VEC * VEC


@triton.jit
def split_row(start, N, VEC: tl.constexpr):
    """(head, count): of N elements from element start on, head come before the first multiple of VEC, then count aligned."""
    first = (start + (VEC - 1)) // VEC * VEC
    head = tl.minimum(first - start, N)
    count = tl.maximum((start + N) // VEC * VEC - first, 0)
    return head, count


@triton.jit
def tile_rows(tile, STEP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The BLOCK_M rows of an int64 tile, STEP apart: STEP tiles share a run of STEP * BLOCK_M rows.

    With STEP = VEC every row of a tile, and of the tiles that are multiples of VEC away, has the same head.
    """
    return tile // STEP * (STEP * BLOCK_M) + tile % STEP + STEP * tl.arange(0, BLOCK_M)


@triton.jit
def edge_columns(e, head, count, N, VEC: tl.constexpr):
    """(columns, in_edge): slot e < VEC is column e of the head, slot VEC + i the i-th column after the aligned part."""
    cols = tl.where(e < VEC, e, head + count + e - VEC)
    return cols, tl.where(e < VEC, e < head, cols < N)


@triton.jit
def unpack(pair, BF16: tl.constexpr):
    """The low and the high 16-bit float of an int32, as fp32. BF16: bfloat16, else float16."""
    if BF16:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        lo = (pair & 65535).to(tl.int16).to(tl.float16, bitcast=True)
        hi = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return lo.to(tl.float32), hi.to(tl.float32)


@triton.jit
def pack(lo, hi, BF16: tl.constexpr, ASM: tl.constexpr):
    """Two fp32 rounded to the nearest 16-bit floats, as one int32. ASM: in one instruction, which the interpreter lacks."""
    if ASM:
        name: tl.constexpr = "cvt.rn.bf16x2.f32" if BF16 else "cvt.rn.f16x2.f32"
        return tl.inline_asm_elementwise(name + " $0, $2, $1;", "=r,r,r", [lo, hi], dtype=tl.int32, is_pure=True, pack=1)
    elif BF16:
        low = lo.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 65535) | (hi.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        low = lo.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 65535) | (hi.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def opaque_zero(N, value):
    """int32 0, for N >= 0, that the compiler takes for a function of the fp32 value.

    x ^ opaque_zero(N, total) is x, but not before total is known and not the x whose unpacked halves are at hand: so the
    compiler keeps the row packed across the reduction, where it would keep both halves in registers and spill them.
    """
    return (N >> 31) & value.to(tl.int32, bitcast=True)


@triton.jit
def sum_of_squares(values, mask, axis: tl.constexpr):
    """The sum of values^2 over axis, for values that are 0 outside mask; the same bits in every thread that holds it.

    Where a thread has one value, its square would go straight into the first exchange between threads and be contracted with
    that addition, a * a + other: the two threads of a pair would round differently. A selection in between prevents it.
    """
    squares = values * values
    if values.shape[axis] <= 64:
        squares = tl.where(mask, squares, 0.0)
    return tl.sum(squares, axis=axis)


@triton.jit
def two_sums(first, second, axis: tl.constexpr):
    """(sum of first, sum of second) over axis: both cross between warps at once, with half the barriers of two sums."""
    return tl.split(tl.sum(tl.join(first, second), axis=axis))


@triton.jit
def exp_sub(x, row_max):
    """exp(x - row_max) in three instructions, where tl.exp takes six. Results below 2^-126 are 0.

    The difference comes first: x * LOG2_E - row_max * LOG2_E would take two, but errs by an ulp of x * LOG2_E.
    """
    return tl.exp2((x - row_max) * LOG2_E)


@triton.jit
def exp_over(x, row_max, log2_sum):
    """exp(x - row_max) / 2^log2_sum in three instructions too. log2_sum errs by an ulp of log2(N), less than sqrt(N) of 1."""
    return tl.exp2((x - row_max) * LOG2_E - log2_sum)


@triton.jit
def _max_bf16x2(a, b):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _max_f16x2(a, b):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pair_max(pairs, BF16: tl.constexpr, ASM: tl.constexpr):
    """The maximum of a block of pairs, as fp32; with ASM two numbers an instruction, and a NaN may be passed over."""
    if ASM:
        lo, hi = unpack(tl.reduce(pairs, 0, _max_bf16x2 if BF16 else _max_f16x2), BF16)
        return tl.maximum(lo, hi)
    else:
        lo, hi = unpack(pairs, BF16)
        return tl.max(tl.maximum(lo, hi), axis=0)
