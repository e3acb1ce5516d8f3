"""Small builders that the cases of all families share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._torch.spec import AuditCase

HALF_DTYPES = (torch.bfloat16, torch.float16)
TRITON_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}


def randn(*shape: int, device: str, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Normal numbers from a seed of their own, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + offset
    return values.to(device=device, dtype=dtype)


def audit_case(
    kernel: Any, config: str, dtype: torch.dtype, args: dict[str, Any], constexprs: dict[str, Any],
    num_warps: int, num_stages: int = 1, aligned: bool | None = None, num_ctas: int = 1,
) -> AuditCase:  # fmt: skip
    """One ahead-of-time compilation, specialised as a launch would be.

    args: name -> "*x" (a pointer to the case's dtype), another Triton type, or an int for an i32 size or stride. An int of
    1 becomes a constant, and a multiple of 16 is marked by ":16". aligned: whether 128-bit loads are due; by default where
    every stride is a multiple of 16.
    """
    name = TRITON_NAMES[dtype]
    signature: dict[str, str] = {}
    constants = dict(constexprs)
    for key, value in args.items():
        if isinstance(value, int) and value == 1:
            constants[key] = 1
        elif isinstance(value, int):
            signature[key] = "i32:16" if value % 16 == 0 else "i32"
        elif value == "*x":
            signature[key] = f"*{name}:16"
        else:
            signature[key] = value + ":16" if value.startswith("*") else value
    if aligned is None:
        aligned = all(v.endswith(":16") for k, v in signature.items() if k.startswith("stride"))
    if num_ctas > 1:
        config += f" clusters of {num_ctas}"
    return AuditCase(kernel, config, name, signature, constants, num_warps, num_stages, aligned, num_ctas)


def cross(first: Iterable[Any], second: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Every pair."""
    second = list(second)
    return [(a, b) for a in first for b in second]
