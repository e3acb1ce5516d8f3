"""What the kernels share that keep whole rows in shared memory: written in Gluon, Triton's lower level, for copies that no thread waits for.

A program copies its next row into shared memory (cp.async, 16 bytes a thread) while it works on the present one, and a thread
reads back what it copied itself: so the copies need no barrier, only the thread's own wait. Triton's interpreter runs no Gluon.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

COLUMNS = 4096  # of a chunk, in which rows are copied: 8 for each thread of 16 warps
WARPS = 16
MAX_REGISTERS = 128  # of a thread: all that so many warps can have. Told so, no compiler aims at 64 and spills
SHARED_BYTES = 232448 - 3072  # that a program on Hopper or datacentre Blackwell can have, less what reductions exchange there

copy_in = (
    getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
)  # its name from Triton 3.9 on, and before
commit, wait = async_copy.commit_group, async_copy.wait_group


@gluon.jit
def row_part(ptr, start, VEC: gl.constexpr):
    """The pointer to element start, a multiple of VEC, in a form from which the compiler sees that it is one."""
    return ptr + start // VEC * VEC


@gluon.jit
def behind(x, N, value):
    """x, 16-bit floats, but for the compiler a function of the fp32 value, for N >= 0 (rows.opaque_zero).

    So x itself stays in registers across the reduction that gives value, and not the fp32 numbers made of it before.
    """
    zero = ((N >> 31) & value.to(gl.int32, bitcast=True)).to(gl.int16)
    return (x.to(gl.int16, bitcast=True) ^ zero).to(x.dtype, bitcast=True)


@gluon.jit
def pair_max(a, b):
    """The maximum of two tensors of 16-bit floats, two elements an instruction. A NaN may be passed over."""
    BF16: gl.constexpr = a.dtype == gl.bfloat16
    name: gl.constexpr = "max.bf16x2" if BF16 else "max.f16x2"
    return gl.inline_asm_elementwise(name + " $0, $1, $2;", "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)
