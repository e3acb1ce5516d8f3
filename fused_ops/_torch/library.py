"""define(spec): an op's raw operators registered with torch.

`fused_ops::<name>_fwd` and `fused_ops::<name>_bwd` are private: they carry no autograd formula. The public function wraps
them in an autograd.Function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .._runtime.backend import implementation
from .._runtime.tuned_kernels import add_kernel
from .compile import add_op, register_inlining
from .spec import REGISTRY, Op

LIBRARY = torch.library.Library("fused_ops", "DEF")

_any_autocast = torch._C._is_any_autocast_enabled
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)  # the keys of every device's autocast
for _name, _key in torch._C.DispatchKey.__members__.items():
    if _name.startswith("Autocast"):
        _AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(_key)


def outside_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """run, outside the caller's autocast regions: what ATen computes in it depends on its arguments alone."""

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        if not _any_autocast():
            return run(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return run(*args)

    return call


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
