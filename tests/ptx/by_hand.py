"""Small programs written by hand, run on the PTX machine."""

from __future__ import annotations

import numpy as np

from fused_ops.testing.ptx.grid import run_grid
from fused_ops.testing.ptx.machine import Code, Machine
from fused_ops.testing.ptx.memory import Global
from fused_ops.testing.ptx.text import Parser

HEAD = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u64 .ptr .global .align 1 k_param_1)
.reqntid {threads}
{{
	.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b64 %rd2, [k_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	shl.b32 %r2, %r1, 2;
	mov.b32 %r3, global_smem;
	add.s32 %r4, %r3, %r2;
"""


def run(body: str, threads: int = 64, words: int = 64, programs: int = 1) -> tuple[np.ndarray, Machine]:
    """Run a program of so many threads on 0, 1, 2, ... in its first tensor; returns the second, and the machine.

    %rd4 and %rd5 are a thread's words of the tensors, %r4 its word of shared memory.
    """
    code = Code(Parser(HEAD.format(threads=threads) + body + "\n\tret;\n}\n").program)
    memory = Global()
    addresses = [
        memory.add("x", np.arange(words, dtype=np.uint32).view(np.uint8)),
        memory.add("y", np.zeros(4 * words, np.uint8)),
    ]
    (machine,) = run_grid(code, memory, addresses, 1, 1024, programs)
    return memory.content(1).view(np.uint32), machine
