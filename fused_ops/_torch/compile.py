"""What torch.compile sees of an op: an opaque operator, ATen's formula, or the Triton kernels.

To Dynamo and AOTAutograd an op is one opaque operator, whose kernel is the one that eager mode runs. Inductor then takes ATen's
formula in its place wherever fusing it with what stands next to it is worth more: `compile_choice` decides that of each call.
`compile_with_aten` decides it of an op beforehand. `FUSED_OPS_INLINE=1` shows the Triton kernels to AOTAutograd, as
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
from .compile_choice import register_when_used
from .compile_state import COMPILE_WITH_ATEN

__all__ = ["COMPILE_WITH_ATEN", "asks_for_aten", "compile_with_aten", "register_inlining"]


def compile_with_aten(*ops: str, enabled: bool | None = True) -> None:
    """What torch.compile makes of these ops (all of them when none is named): ATen's formula, our operator, or the better one.

    Args:
        ops: names as in REGISTRY: "layer_norm", "softmax", "linear", ...
        enabled: True for ATen's formula wherever the op stands, False for our operator; None, which every op starts with, for
            what each graph is better off with: our operator where it launches no more kernels and moves no more bytes than
            ATen's formula fused with its neighbours (`explain_compiled` tells).

    A compiled function that is called again after the switch changed is compiled again, and Inductor's caches keep the settings
    apart. Eager calls and torch.export are not concerned. The environment's FUSED_OPS_COMPILE_WITH_ATEN=layer_norm,softmax (or
    all) sets True from the start.

    Raises:
        ValueError: an op of no such name.
    """
    for name in ops or tuple(COMPILE_WITH_ATEN):
        if name not in COMPILE_WITH_ATEN:
            raise ValueError(f"compile_with_aten: ops: got {name!r}, allowed: {', '.join(map(repr, COMPILE_WITH_ATEN))}")
        COMPILE_WITH_ATEN[name] = enabled


def asks_for_aten(op: str) -> bool:
    """Whether a public function that is being compiled is to compute with ATen's functions at once. For a compilation's trace."""
    register_when_used()
    return COMPILE_WITH_ATEN.get(op) is True


def register_inlining(library: Any, name: str, run: Callable[..., Any]) -> None:
    """Let AOTAutograd trace run, which launches the kernels of fused_ops::name, where `_inlines` allows it.

    Everywhere else the operator stays opaque.
    """

    def rule(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        register_when_used()
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
