"""What computes a product with an epilogue on a GPU: the one table of where a library's kernel takes the place of ours.

A rule is here because the library was measured at least a tenth faster, or is forecast to be by kernels/linear's tiles; its
reason says so. `forced_config` overrules it. On a CPU ATen or, interpreted, our kernels compute.

No rule is for the product with an activation's derivative in its epilogue ("dact") of 16-bit tensors: cuBLAS must hand over fp32,
for a gradient rounded in between is beyond the contract, and that costs what it saves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..._runtime.device import FP8

USES = ("fwd", "train", "dact", "gated", "sum", "fp8")
"""A linear's forward; one that saves the pre-activation too; dpre of a two-layer perceptron; the gated linear; its dx; fp8."""


class Rule(NamedTuple):
    """In these uses, activations (none named: any) and dtypes, from so many rows on, backend computes, for this reason.

    backend: "cublas", and bias and activation in one kernel of ours; "cublaslt", which has the activation in its epilogue; or
    "scaled_mm", torch's fp8 product. aligned: only where TMA could read the operands, so that the library takes its fast kernels.
    capabilities: major numbers; none named: any.
    """

    uses: tuple[str, ...]
    activations: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    least_rows: int
    backend: str
    reason: str
    aligned: bool = False
    capabilities: tuple[int, ...] = ()


RULES = (
    Rule(
        ("fwd", "train", "dact", "gated", "sum"), (), (torch.float32,), 0, "cublas",
        "fp32 products: cuBLAS, in torch's TF32 setting, then bias and activation in one kernel",
    ),
    Rule(
        ("fwd",), ("none",), (torch.float16, torch.bfloat16), 0, "cublas",
        "no activation: cuBLAS adds the bias itself, nothing is left to fuse",
    ),
    Rule(  # fp16 stays ours: how cuBLASLt's tanh errs was measured where bf16's rounding hides it
        ("fwd",), ("gelu_tanh",), (torch.bfloat16,), 65, "cublaslt",
        "tanh-GELU of bf16: cuBLASLt has it in its own epilogue, 131 us against 189 on an H200 at 16384x3072x768, as exact as ours",
        aligned=True, capabilities=(8, 9, 10),
    ),
    Rule(
        ("fp8",), (), (FP8,), 257, "scaled_mm",
        "large fp8: torch._scaled_mm, 409 us against 607 on an H200 at 8192x8192x4096; what follows it is one kernel on its fp32",
        aligned=True, capabilities=(9,),
    ),
)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def rule(use: str, activation: str, dtype: torch.dtype, rows: int, aligned: bool, major: int) -> Rule | None:
    """The first rule for a use; None where our kernel computes.

    rows: M, rounded up to whole tiles. aligned: whether TMA could read the operands. major: the compute capability's.
    """
    for found in RULES:
        if (
            use in found.uses
            and dtype in found.dtypes
            and (not found.activations or activation in found.activations)
            and rows >= found.least_rows
            and (aligned or not found.aligned)
            and (not found.capabilities or major in found.capabilities)
        ):
            return found
    return None


CUBLAS_ONLY = frozenset(dtype for found in RULES if not found.activations and "dact" in found.uses for dtype in found.dtypes)
"""The dtypes whose products cuBLAS computes whatever surrounds them."""
