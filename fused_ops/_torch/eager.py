"""The fast path: from a public function straight to an implementation, past torch's dispatcher.

The dispatcher costs about 2 µs on the host, as much as all the rest of a call. It is needed when a compiler, a dispatch
mode, a tensor subclass, a torch.func transform, a tracer, autocast or the profiler takes part in the call. Otherwise it is
skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .._runtime.backend import implementation
from .._runtime.settings import INTERPRET

_ORDINARY_TYPES = frozenset((Tensor, Parameter))
_STRIDED = torch.strided

_is_compiling = torch.compiler.is_dynamo_compiling  # other compilers bring fake tensors or a dispatch mode
_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_included = torch._C._dispatch_tls_is_dispatch_key_included
_profiling = torch._C._autograd._profiler_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._is_tracing
_grad_enabled = torch.is_grad_enabled
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def fast_path(first: Tensor, *others: Tensor | None) -> str | None:
    """The fast path that a call on these tensors may take, or None where it must go through the dispatcher.

    Returns:
        "aten": CPU tensors, none of which needs a gradient. The caller may run one ATen function instead of the whole op: ATen
            itself handles transforms, forward-mode AD and bad arguments.
        "cuda", "cuda grad", "cpu grad": tensors on one device, without or with one that needs a gradient. The caller may run
            the implementation for that device, once it has checked the arguments.
        None: something else takes part in the call (see the module's docstring), the kernels are interpreted, a tensor has
            its negative bit set, which the dispatcher resolves, or is sparse or of MKL-DNN.
    """
    if _is_compiling() or _modes() or _function_modes() or _profiling() or _tracing() or _any_autocast():
        return None
    if type(first) not in _ORDINARY_TYPES or first.layout is not _STRIDED:
        return None
    recording = _grad_enabled()
    needed = recording and first.requires_grad
    if first.is_cpu:
        for tensor in others:
            if tensor is not None:
                if type(tensor) not in _ORDINARY_TYPES or not tensor.is_cpu or tensor.layout is not _STRIDED:
                    return None
                needed = needed or (recording and tensor.requires_grad)
        if INTERPRET:
            return None
        if not needed:
            return "aten"
    else:
        if not first.is_cuda or first.is_neg() or _included(_PRE_DISPATCH):
            return None
        device = first.get_device()
        for tensor in others:
            if tensor is not None:
                if type(tensor) not in _ORDINARY_TYPES or tensor.get_device() != device or tensor.is_neg():
                    return None
                if tensor.layout is not _STRIDED:
                    return None
                needed = needed or (recording and tensor.requires_grad)
    if _transforms() or forward_ad._current_level >= 0:
        return None
    return ("cpu grad" if first.is_cpu else "cuda grad") if needed else "cuda"


def implementations(name: str, reference: Callable[..., Any], launch: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The implementations of a raw operator that the fast path calls, as {"aten": ..., "cuda": ...}."""
    return {
        "aten": implementation(name, reference, launch, "cpu"),
        "cuda": implementation(name, reference, launch, "cuda"),
    }


def fast_applies(
    function: type[torch.autograd.Function], forward: Callable[..., Any], runs: dict[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """The fast path's {"cpu grad": ..., "cuda grad": ...}: function.apply without torch's Python wrapper for transforms.

    forward(run, ctx, *args) is the Function's forward, with the implementation to call as its first argument.
    """

    def apply(run: Callable[..., Any]) -> Callable[..., Any]:
        short = type(function.__name__, (function,), {"forward": staticmethod(functools.partial(forward, run))})
        return super(torch.autograd.Function, short).apply  # type: ignore[misc]

    return {"cpu grad": apply(runs["aten"]), "cuda grad": apply(runs["cuda"])}
