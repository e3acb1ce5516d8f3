"""define(spec): an op's raw operators registered with torch.

`fused_ops::<name>_fwd` and `fused_ops::<name>_bwd` are private: they carry no autograd formula. The public function wraps
them in an autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._runtime.backend import implementation
from .._runtime.tuned_kernels import add_kernel
from .compile import add_op, register_inlining
from .spec import REGISTRY, Op

LIBRARY = torch.library.Library("fused_ops", "DEF")


def define(spec: Op) -> Op:
    """Register an op's raw operators with torch, and enter it in REGISTRY."""
    if spec.name in REGISTRY:
        raise ValueError(f"op {spec.name!r} is defined twice")
    for raw in spec.raw:
        LIBRARY.define(raw.name + raw.schema)
        LIBRARY.impl(raw.name, raw.reference, "CompositeExplicitAutograd")
        for device in ("cpu", "cuda"):
            LIBRARY.impl(raw.name, implementation(raw.name, raw.reference, raw.launch, device), device.upper())
        torch.library.register_fake(f"fused_ops::{raw.name}", raw.reference, lib=LIBRARY)
        register_inlining(LIBRARY, raw.name, raw.launch)
        if raw.tuned is not None:
            add_kernel(raw.name, raw.tuned)
    REGISTRY[spec.name] = spec
    add_op(spec.name)
    return spec


def decompositions() -> dict[Any, Callable[..., Any]]:
    """{raw operator: the ATen reference that replaces it}: a table for ExportedProgram.run_decompositions."""
    return {raw.overload: raw.reference for op in REGISTRY.values() for raw in op.raw}
