"""Softmax over rows of 16-bit floats too long for registers, read once: they wait in shared memory (shared_rows.py)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..config import SHARED_COLUMNS, RowConfig, cdiv, next_power_of_2
from ..rows import edge_columns, exp_over, exp_sub, split_row
from ..shared_rows import COLUMNS, MAX_REGISTERS, SHARED_BYTES, WARPS, behind, commit, copy_in, pair_max, row_part, wait

EDGES_BWD = SHARED_BYTES // 4 // COLUMNS * COLUMNS  # of rows that start anywhere: both wait in shared memory alone


def softmax_shared_config(kernel: str, N: int, edges: bool = False) -> RowConfig | None:
    """The configuration of softmax_fwd or softmax_bwd over rows of N 16-bit columns; None where they do not wait in shared memory.

    edges: whether rows may start anywhere, which the backward alone takes.
    """
    least, most = SHARED_COLUMNS[kernel]
    fits = least < N <= (EDGES_BWD if edges else most) and (kernel == "softmax_bwd" or not edges)
    return RowConfig(1, next_power_of_2(N), WARPS, "shared") if fits else None


def placement(N: int, rows: int) -> dict[str, int]:
    """The options that say where rows of N columns wait: how many chunks in SHARED memory, how many HELD in registers.

    rows: how many rows share the memory, the last of them in part: 1 forward, 2 backward.
    """
    all_chunks = cdiv(N, COLUMNS)
    shared = min(all_chunks, SHARED_BYTES // (2 * COLUMNS) - (rows - 1) * all_chunks)
    return {"BLOCK_N": COLUMNS, "SHARED": shared, "HELD": all_chunks - shared, "num_warps": WARPS, "maxnreg": MAX_REGISTERS}


@gluon.jit
def softmax_fwd_shared_kernel(
    x_ptr, y_ptr, M, N, stride_xm, stride_ym,
    VEC: gl.constexpr, BLOCK_N: gl.constexpr, SHARED: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """y = exp(x - max(x)) / sum(exp(x - max(x))) over each row.

    x, y (M, N) both bfloat16 or both float16, last stride 1; N and the row strides multiples of VEC = 8
    Grid (programs,): program p takes rows p, p + programs, ... N <= (SHARED + HELD) * BLOCK_N: so many chunks of a row lie in
    shared memory and so many in registers, a chunk being VEC columns a thread. fp32 inside. x is read once.
    A row of -inf, or one with NaN or +inf, gives NaN.
    """
    layout: gl.constexpr = gl.BlockedLayout([VEC], [32], [gl.num_warps()], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=VEC, per_phase=1, max_phase=1, order=[0])
    INF: gl.constexpr = float("-inf")
    FULL: gl.constexpr = SHARED - (HELD == 0)  # chunks in shared memory that end before the row does
    out: gl.constexpr = y_ptr.dtype.element_ty
    end = N // VEC * VEC
    cols = gl.arange(0, BLOCK_N, layout=layout)
    chunks = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [SHARED, BLOCK_N], flat)
    row = gl.program_id(0).to(gl.int64)
    programs = gl.num_programs(0)
    x_row = row_part(x_ptr, row * stride_xm, VEC)
    for i in gl.static_range(SHARED):
        copy_in(chunks.index(i), x_row + i * BLOCK_N + cols, mask=i * BLOCK_N + cols < end)
    commit()
    held = ()
    for j in gl.static_range(HELD):
        at = (SHARED + j) * BLOCK_N + cols
        held = held + (gl.load(x_row + at, mask=at < end, other=INF),)
    for _ in range(gl.program_id(0), M, programs):
        wait(0)
        largest = gl.full([BLOCK_N], INF, x_ptr.dtype.element_ty, layout)
        for c in range(FULL):
            largest = pair_max(largest, chunks.index(c).load(layout))
        for c in range(FULL, SHARED):
            x = gl.where(c * BLOCK_N + cols < end, chunks.index(c).load(layout), INF)
            largest = pair_max(largest, x.to(largest.dtype))
        for j in gl.static_range(HELD):
            largest = pair_max(largest, held[j])
        row_max = gl.max(largest.to(gl.float32), axis=0)
        total = gl.zeros([BLOCK_N], gl.float32, layout)
        for c in range(FULL):
            total += exp_sub(chunks.index(c).load(layout).to(gl.float32), row_max)
        for c in range(FULL, SHARED):
            e = exp_sub(chunks.index(c).load(layout).to(gl.float32), row_max)
            total += gl.where(c * BLOCK_N + cols < end, e, 0.0)
        again = ()
        for j in gl.static_range(HELD):
            again = again + (behind(held[j], N, row_max),)
            total += exp_sub(again[j].to(gl.float32), row_max)
        log2_sum = gl.log2(gl.sum(total, axis=0))
        y_row = row_part(y_ptr, row * stride_ym, VEC)
        row += programs
        more = row < M
        x_row = row_part(x_ptr, row * stride_xm, VEC)
        for c in range(SHARED):
            at = c * BLOCK_N + cols
            y = exp_over(chunks.index(c).load(layout).to(gl.float32), row_max, log2_sum)
            gl.store(y_row + at, y.to(out), mask=at < end)
            copy_in(chunks.index(c), x_row + at, mask=more & (at < end))
        commit()
        held = ()
        for j in gl.static_range(HELD):
            at = (SHARED + j) * BLOCK_N + cols
            y = exp_over(behind(again[j], N, log2_sum).to(gl.float32), row_max, log2_sum)
            gl.store(y_row + at, y.to(out), mask=at < end)
            held = held + (gl.load(x_row + at, mask=more & (at < end), other=INF),)


@gluon.jit
def softmax_bwd_shared_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N, stride_dym, stride_ym, stride_dxm,
    VEC: gl.constexpr, EDGES: gl.constexpr, BLOCK_N: gl.constexpr, SHARED: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """dx = (dy - sum(dy * y)) * y over each row.

    dy, y, dx (M, N) all bfloat16 or all float16, last stride 1; N and the row strides are multiples of VEC = 8, or, with EDGES,
    row i of the three starts equally far from one
    Grid (programs,): program p takes rows p, p + programs, ... N <= (SHARED + HELD) * BLOCK_N: y lies in shared memory, so do SHARED
    chunks of dy, and HELD of them in registers. fp32 inside. dy and y are read once.
    """
    layout: gl.constexpr = gl.BlockedLayout([VEC], [32], [gl.num_warps()], [0])
    few: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=VEC, per_phase=1, max_phase=1, order=[0])
    out: gl.constexpr = dx_ptr.dtype.element_ty
    FULL: gl.constexpr = SHARED - (HELD == 0) * (
        1 + EDGES
    )  # chunks of both rows that end before the row does, wherever it starts
    slots = gl.arange(0, 2 * VEC, layout=few)
    cols = gl.arange(0, BLOCK_N, layout=layout)
    ys = gl.allocate_shared_memory(y_ptr.dtype.element_ty, [SHARED + HELD, BLOCK_N], flat)
    dys = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [SHARED, BLOCK_N], flat)
    row = gl.program_id(0).to(gl.int64)
    programs = gl.num_programs(0)
    head, end = split_row(row * stride_ym, N, VEC) if EDGES else (0, N // VEC * VEC)
    y_row = row_part(y_ptr, row * stride_ym + head, VEC)
    dy_row = row_part(dy_ptr, row * stride_dym + head, VEC)
    for i in gl.static_range(SHARED + HELD):
        copy_in(ys.index(i), y_row + i * BLOCK_N + cols, mask=i * BLOCK_N + cols < end)
    for i in gl.static_range(SHARED):
        copy_in(dys.index(i), dy_row + i * BLOCK_N + cols, mask=i * BLOCK_N + cols < end)
    commit()
    held = ()
    for j in gl.static_range(HELD):
        at = (SHARED + j) * BLOCK_N + cols
        held = held + (gl.load(dy_row + at, mask=at < end, other=0.0),)
    for _ in range(gl.program_id(0), M, programs):
        if EDGES:
            edge, in_edge = edge_columns(slots, head, end, N, VEC)
            y_edge = gl.load(y_ptr + row * stride_ym + edge, mask=in_edge, other=0.0).to(gl.float32)
            dy_edge = gl.load(dy_ptr + row * stride_dym + edge, mask=in_edge, other=0.0).to(gl.float32)
        wait(0)
        dots = gl.zeros([BLOCK_N], gl.float32, layout)
        for c in range(FULL):
            dots += ys.index(c).load(layout).to(gl.float32) * dys.index(c).load(layout).to(gl.float32)
        for c in range(FULL, SHARED):
            product = ys.index(c).load(layout).to(gl.float32) * dys.index(c).load(layout).to(gl.float32)
            dots += gl.where(c * BLOCK_N + cols < end, product, 0.0)
        for j in gl.static_range(HELD):
            y = ys.index(SHARED + j).load(layout).to(gl.float32)
            dots += gl.where((SHARED + j) * BLOCK_N + cols < end, y, 0.0) * held[j].to(gl.float32)
        dot = gl.sum(dots, axis=0)
        if EDGES:
            dot += gl.sum(dy_edge * y_edge, axis=0)
            gl.store(dx_ptr + row * stride_dxm + edge, ((dy_edge - dot) * y_edge).to(out), mask=in_edge)
        now = end
        dx_row = row_part(dx_ptr, row * stride_dxm + head, VEC)
        row += programs
        more = row < M
        if EDGES:
            head, end = split_row(row * stride_ym, N, VEC)
        y_row = row_part(y_ptr, row * stride_ym + head, VEC)
        dy_row = row_part(dy_ptr, row * stride_dym + head, VEC)
        for c in range(SHARED):
            at = c * BLOCK_N + cols
            dx = (dys.index(c).load(layout).to(gl.float32) - dot) * ys.index(c).load(layout).to(gl.float32)
            gl.store(dx_row + at, dx.to(out), mask=at < now)
            copy_in(ys.index(c), y_row + at, mask=more & (at < end))
            copy_in(dys.index(c), dy_row + at, mask=more & (at < end))
        rest = ()
        for j in gl.static_range(HELD):
            at = (SHARED + j) * BLOCK_N + cols
            dx = (held[j].to(gl.float32) - dot) * ys.index(SHARED + j).load(layout).to(gl.float32)
            gl.store(dx_row + at, dx.to(out), mask=at < now)
            rest = rest + (gl.load(dy_row + at, mask=more & (at < end), other=0.0),)
            copy_in(ys.index(SHARED + j), y_row + at, mask=more & (at < end))
        held = rest
        commit()
