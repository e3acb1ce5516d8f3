"""Layer norm's backward over rows of 16-bit floats too long for registers, read once: this row and the next in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..config import SHARED_COLUMNS, RowConfig, cdiv, next_power_of_2
from ..shared_rows import COLUMNS, MAX_REGISTERS, WARPS, commit, copy_in, row_part, wait


def layer_norm_bwd_shared_config(N: int, capability: tuple[int, int]) -> RowConfig | None:
    """The configuration of the backward over rows of N 16-bit columns; None where they do not wait in shared memory.

    Hopper alone: for datacentre Blackwell Triton 3.6 spills.
    """
    least, most = SHARED_COLUMNS["layer_norm_bwd"]
    fits = least < N <= most and capability[0] == 9
    return RowConfig(1, next_power_of_2(N), WARPS, "shared") if fits else None


def placement(N: int) -> dict[str, int]:
    """The options that follow from N."""
    return {"BLOCK_N": COLUMNS, "CHUNKS": cdiv(N, COLUMNS), "num_warps": WARPS, "maxnreg": MAX_REGISTERS}


@gluon.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@gluon.jit
def layer_norm_bwd_shared_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_part_ptr, db_part_ptr, M, N, stride_dym, stride_xm, stride_dxm,
    HAS_WEIGHT: gl.constexpr, NEED_DW: gl.constexpr, NEED_DB: gl.constexpr,
    VEC: gl.constexpr, BLOCK_N: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  g = dy * w;   dw = sum(dy * x_hat),  db = sum(dy)

    dy, x (M, N) 16 bits, last stride 1 | w (N,) any float, stride 1 | mean, rstd (M,) fp32 | dx (M, N), last stride 1
    dw_part, db_part (P, N) fp32, P the number of programs, written with NEED_DW, NEED_DB
    Grid (P,). Program p takes rows p, p + P, ... and writes partial row p once. N <= CHUNKS * BLOCK_N, N and the row strides are
    multiples of VEC = 8. fp32 inside; dw and db in registers, w and two rows of x and of dy in shared memory. x, dy are read once.
    """
    layout: gl.constexpr = gl.BlockedLayout([VEC], [32], [gl.num_warps()], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=VEC, per_phase=1, max_phase=1, order=[0])
    end = N // VEC * VEC
    cols = gl.arange(0, BLOCK_N, layout=layout)
    xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2 * CHUNKS, BLOCK_N], flat)
    dys = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [2 * CHUNKS, BLOCK_N], flat)
    row = gl.program_id(0).to(gl.int64)
    programs = gl.num_programs(0)
    if HAS_WEIGHT:
        ws = gl.allocate_shared_memory(w_ptr.dtype.element_ty, [CHUNKS, BLOCK_N], flat)
        for i in gl.static_range(CHUNKS):
            copy_in(ws.index(i), w_ptr + i * BLOCK_N + cols, mask=i * BLOCK_N + cols < end)
    x_row = row_part(x_ptr, row * stride_xm, VEC)
    dy_row = row_part(dy_ptr, row * stride_dym, VEC)
    for i in gl.static_range(CHUNKS):
        copy_in(xs.index(i), x_row + i * BLOCK_N + cols, mask=i * BLOCK_N + cols < end)
        copy_in(dys.index(i), dy_row + i * BLOCK_N + cols, mask=i * BLOCK_N + cols < end)
    commit()
    dw, db = (), ()
    for i in gl.static_range(CHUNKS):
        dw = dw + (gl.zeros([BLOCK_N], gl.float32, layout),)
        db = db + (gl.zeros([BLOCK_N], gl.float32, layout),)
    here = 0  # the first chunk of this row's half of the buffers
    for _ in range(gl.program_id(0), M, programs):
        more = row + programs < M
        x_row = row_part(x_ptr, (row + programs) * stride_xm, VEC)
        dy_row = row_part(dy_ptr, (row + programs) * stride_dym, VEC)
        for i in gl.static_range(CHUNKS):
            mask = more & (i * BLOCK_N + cols < end)
            copy_in(xs.index(CHUNKS - here + i), x_row + i * BLOCK_N + cols, mask=mask)
            copy_in(dys.index(CHUNKS - here + i), dy_row + i * BLOCK_N + cols, mask=mask)
        commit()
        mean = gl.load(mean_ptr + row)
        rstd = gl.load(rstd_ptr + row)
        wait(1)
        g_sums = gl.zeros([BLOCK_N], gl.float32, layout)
        gx_sums = gl.zeros([BLOCK_N], gl.float32, layout)
        for c in range(CHUNKS):
            in_row = c * BLOCK_N + cols < end
            g = dys.index(here + c).load(layout).to(gl.float32)
            if HAS_WEIGHT:
                g *= ws.index(c).load(layout).to(gl.float32)
            g = gl.where(in_row, g, 0.0)
            x_hat = gl.where(in_row, (xs.index(here + c).load(layout).to(gl.float32) - mean) * rstd, 0.0)
            g_sums += g
            gx_sums += g * x_hat
        g_sum, gx_sum = gl.reduce((g_sums, gx_sums), 0, _add_both)
        g_mean, gx_mean = g_sum / N, gx_sum / N
        dx_row = row_part(dx_ptr, row * stride_dxm, VEC)
        dw_before, db_before, dw, db = dw, db, (), ()
        for i in gl.static_range(CHUNKS):
            at = i * BLOCK_N + cols
            dy = gl.where(at < end, dys.index(here + i).load(layout).to(gl.float32), 0.0)
            x_hat = gl.where(at < end, (xs.index(here + i).load(layout).to(gl.float32) - mean) * rstd, 0.0)
            g = dy
            if HAS_WEIGHT:
                g = dy * ws.index(i).load(layout).to(gl.float32)
            gl.store(dx_row + at, (rstd * (g - g_mean - x_hat * gx_mean)).to(dx_ptr.dtype.element_ty), mask=at < end)
            dw = dw + (dw_before[i] + dy * x_hat,)
            db = db + (db_before[i] + dy,)
        row += programs
        here = CHUNKS - here
    wait(0)
    part = gl.program_id(0).to(gl.int64) * N
    for i in gl.static_range(CHUNKS):
        at = i * BLOCK_N + cols
        if NEED_DW:
            gl.store(row_part(dw_part_ptr, part, VEC) + at, dw[i], mask=at < end)
        if NEED_DB:
            gl.store(row_part(db_part_ptr, part, VEC) + at, db[i], mask=at < end)
