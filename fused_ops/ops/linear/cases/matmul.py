"""What the audit entries of all matmul families share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...._torch.spec import AuditCase
from ...case_builders import TRITON_NAMES, audit_case

SMS = 132


def matmul_case(
    kernel: Any, config: Any, dtype: torch.dtype, args: dict[str, Any], constexprs: dict[str, Any], label: str = ""
) -> AuditCase:
    """One launch of a matmul kernel with a MatmulConfig; of args, those that the kernel has.

    Tensor copies by TMA and the 16-row tiles of small M are no loads of 128 bits a thread: not held to that width.
    """
    names = kernel.arg_names
    tiles = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        "SUBTILES": config.subtiles, "WARP_SPECIALIZE": False, "PRECISION": "ieee", "WIDEN": False, "IMPRECISE": 0,
    }  # fmt: skip
    constants = {k: v for k, v in (tiles | constexprs).items() if k in names}
    name = f"{label}{config.block_m}x{config.block_n}x{config.block_k}"
    values = {k: v for k, v in args.items() if k in names and k not in constants}
    case = audit_case(kernel, name, dtype, values, constants, config.num_warps, config.num_stages)
    wide = config.kind != "tma" and config.block_m > 16 and "any" not in label
    return dataclasses.replace(case, aligned=case.aligned and wide)


def unaligned(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same arguments at no alignment: pointers of any address, sizes and strides no multiples of 16."""
    name = TRITON_NAMES[dtype]

    def loosen(value: Any) -> Any:
        if value == "*x":
            return f"*{name}"
        return "i32" if isinstance(value, int) and value > 1 else value

    return {k: loosen(v) for k, v in args.items()}
