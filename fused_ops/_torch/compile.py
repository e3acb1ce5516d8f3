"""What torch.compile sees of an op: an opaque operator, ATen's formula, or the Triton kernels.

Opaque operator, the default: the raw operator stays one node of the graph, and Inductor calls the kernel that eager mode
runs. ATen's formula: `compile_with_aten("layer_norm")` lets Inductor fuse the op with its neighbours. Which of the two is
faster only a measurement on the model at hand can tell. Triton kernels: `FUSED_OPS_INLINE=1` shows them to AOTAutograd, as
torch.library.triton_op does, so that an AOTInductor package holds their binaries and needs no Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from .._runtime import launch, settings
from .._runtime.backend import chosen
from .._runtime.device import KERNEL_DTYPES
from .._runtime.notices import LOGGER

COMPILE_WITH_ATEN: dict[str, bool] = {}


def add_op(name: str) -> None:
    """Enter an op in COMPILE_WITH_ATEN: off, unless FUSED_OPS_COMPILE_WITH_ATEN names it or is "all"."""
    COMPILE_WITH_ATEN[name] = bool(settings.COMPILE_WITH_ATEN & {name, "all"})


def compile_with_aten(*ops: str, enabled: bool = True) -> None:
    """Whether torch.compile sees ATen's formula of these ops (all of them when none is named) instead of our operator.

    Args:
        ops: names as in REGISTRY: "layer_norm", "softmax", "linear", ...
        enabled: True for ATen, False for our operator, which is the default for every op: no measurement says otherwise yet.

    A compiled function that is called again after the switch changed is compiled again. Eager calls and torch.export are
    not concerned. The environment's FUSED_OPS_COMPILE_WITH_ATEN=layer_norm,softmax (or all) sets it from the start.

    Raises:
        ValueError: an op of no such name.
    """
    for name in ops or tuple(COMPILE_WITH_ATEN):
        if name not in COMPILE_WITH_ATEN:
            raise ValueError(f"compile_with_aten: ops: got {name!r}, allowed: {', '.join(map(repr, COMPILE_WITH_ATEN))}")
        COMPILE_WITH_ATEN[name] = enabled


def register_inlining(library: Any, name: str, run: Callable[..., Any]) -> None:
    """Let AOTAutograd trace run, which launches the kernels of fused_ops::name, where `_inlines` allows it.

    Everywhere else the operator stays opaque.
    """

    def rule(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _inlines(types, args):
            try:
                with mode:
                    return run(*args)
            except Exception as error:  # whatever the reason, the opaque operator is right
                LOGGER.debug("fused_ops: %s is not inlined: %s: %s", name, type(error).__name__, error)
        return mode.__torch_dispatch__(op, types, args, kwargs)

    torch.library.register_torch_dispatch(f"fused_ops::{name}", FunctionalTensorMode, rule, lib=library)


def _inlines(types: Any, args: tuple[Any, ...]) -> bool:
    """Whether the kernels are to be traced: on request, for CUDA tensors that have a kernel, and with known sizes.

    A configuration chosen from a symbolic size would tie the graph to that size.
    """
    if not settings.INLINE or chosen("cuda")[0] != "triton" or torch.compiler.is_exporting():
        return False
    if any(not issubclass(t, (FunctionalTensor, FakeTensor)) and t is not Tensor for t in types):
        return False
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    tensors = [a for a in args if isinstance(a, Tensor)]
    return not custom_triton_ops_decomposition_disabled() and all(
        t.is_cuda and t.dtype in KERNEL_DTYPES and all(type(n) is int for n in (*t.shape, *t.stride())) for t in tensors
    )


def _launch_as_node(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Add a launch to the graph that is being traced."""
    torch.library.wrap_triton(kernel)[(grid,)](*args, **kwargs)


launch.when_traced(FunctionalTensor, _launch_as_node)
