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
from .compile import register_inlining
from .compile_state import add_op
from .regions import outside_autocast
from .spec import REGISTRY, Op

LIBRARY = torch.library.Library("fused_ops", "DEF")


def define(spec: Op) -> Op:
    """Register an op's raw operators with torch, and enter it in REGISTRY."""
    if spec.name in REGISTRY:
        raise ValueError(f"op {spec.name!r} is defined twice")
    for raw in spec.raw:
        reference = outside_autocast(raw.reference)
        LIBRARY.define(raw.name + raw.schema)
        LIBRARY.impl(raw.name, reference, "CompositeExplicitAutograd")
        for device in ("cpu", "cuda"):
            run = implementation(raw.name, raw.reference, raw.launch, device)
            LIBRARY.impl(raw.name, outside_autocast(run), device.upper())
        torch.library.register_fake(f"fused_ops::{raw.name}", reference, lib=LIBRARY)
        register_inlining(LIBRARY, raw.name, outside_autocast(raw.launch))
        if raw.tuned is not None:
            add_kernel(raw.name, raw.tuned)
    REGISTRY[spec.name] = spec
    add_op(spec.name)
    return spec


def decompositions() -> dict[Any, Callable[..., Any]]:
    """{raw operator: the ATen reference that replaces it}: a table for ExportedProgram.run_decompositions."""
    return {raw.overload: outside_autocast(raw.reference) for op in REGISTRY.values() for raw in op.raw}
