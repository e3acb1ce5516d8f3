"""Which implementation of a raw operator runs on which device, and why.

CUDA tensors: the Triton kernel. CPU tensors: ATen, or the same kernel in Triton's interpreter when TRITON_INTERPRET=1 was
set before the first import. FUSED_OPS_BACKEND=triton|aten decides for both. A fallback is warned of once.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from . import settings
from .notices import warn_once
from .nvtx import in_nvtx_range

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NO_CPU_KERNELS = (
    "FUSED_OPS_BACKEND=triton, but the tensors are on the CPU: Triton kernels need a CUDA device, or"
    " TRITON_INTERPRET=1 set before the first import of fused_ops"
)
NO_TRITON = "Triton is not installed (pip install triton); ATen runs instead"
NO_FP64 = "there is no float64 kernel; ATen runs instead"
NO_TRITON_FORCED = "FUSED_OPS_BACKEND=triton, but Triton is not installed (pip install triton)"


def chosen(device_type: str) -> tuple[str, str]:
    """(backend, reason) for tensors of a device type; backend is "triton", "interpreter", "aten" or "refused"."""
    if settings.BACKEND == "aten":
        return "aten", "FUSED_OPS_BACKEND=aten"
    if device_type == "cuda":
        if TRITON_INSTALLED:
            return "triton", "CUDA tensors run the Triton kernels"
        return ("refused", NO_TRITON_FORCED) if settings.BACKEND == "triton" else ("aten", NO_TRITON)
    if device_type == "cpu":
        if settings.INTERPRET:
            return "interpreter", "TRITON_INTERPRET is set: CPU tensors run the Triton kernels in the interpreter"
        return ("refused", NO_CPU_KERNELS) if settings.BACKEND == "triton" else ("aten", "CPU tensors run ATen")
    return "aten", f"no kernels for {device_type} tensors"


def implementation(
    name: str, reference: Callable[..., Any], launch: Callable[..., Any], device_type: str
) -> Callable[..., Any]:
    """The function that computes the raw operator name on tensors of a device type.

    It is launch (the kernels), reference (ATen), or a function that raises and says why neither can run.
    """
    backend, reason = chosen(device_type)
    run = launch if backend in ("triton", "interpreter") else reference
    if backend == "refused":
        run = functools.partial(_refused, reason)
    elif reason == NO_TRITON:
        run = functools.partial(_instead, name, reason, reference)
    if settings.NVTX:
        run = in_nvtx_range(f"fused_ops::{name}", run)
    return run


def _refused(reason: str, *_: Any) -> Any:
    raise RuntimeError(reason)


def _instead(name: str, reason: str, reference: Callable[..., Any], *args: Any) -> Any:
    warn_once(name, reason)
    return reference(*args)
