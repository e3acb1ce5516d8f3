"""define(spec): an op's raw operators registered with torch.

`fused_ops::<name>_fwd` and `fused_ops::<name>_bwd` are private: they carry no autograd formula. The public function wraps
them in an autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._runtime.backend import implementation
from .compile import add_op, register_inlining
from .spec import FORWARD_ONLY, NO_BACKWARD, REGISTRY, OpSpec

LIBRARY = torch.library.Library("fused_ops", "DEF")


def define(spec: OpSpec) -> OpSpec:
    """Register an op's raw operators with torch, and enter it in REGISTRY, or in FORWARD_ONLY where it has no backward."""
    if spec.name in REGISTRY or spec.name in FORWARD_ONLY:
        raise ValueError(f"op {spec.name!r} is defined twice")
    for suffix, schema, reference, launch in (
        ("fwd", spec.schema, spec.reference, spec.launch),
        ("bwd", spec.backward.schema, spec.backward.reference, spec.backward.launch),
    ):
        if not schema:
            continue
        name = f"{spec.name}_{suffix}"
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        for device in ("cpu", "cuda"):
            LIBRARY.impl(name, implementation(name, reference, launch, device), device.upper())
        torch.library.register_fake(f"fused_ops::{name}", reference, lib=LIBRARY)
        register_inlining(LIBRARY, name, launch)
    (FORWARD_ONLY if spec.backward is NO_BACKWARD else REGISTRY)[spec.name] = spec
    add_op(spec.name)
    return spec


def decompositions() -> dict[Any, Callable[..., Any]]:
    """{raw operator: the ATen reference that replaces it}: a table for ExportedProgram.run_decompositions."""
    table: dict[Any, Callable[..., Any]] = {}
    for spec in REGISTRY.values():
        table[spec.fwd] = spec.reference
        table[spec.bwd] = spec.backward.reference
    table |= {spec.fwd: spec.reference for spec in FORWARD_ONLY.values()}
    return table
