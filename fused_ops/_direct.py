"""The short way from a public function to an implementation: past torch's dispatcher when it would do nothing but call it.

The dispatcher costs about 2 µs on the host, as much as all the rest of a call. It is needed when someone else has a say:
a compiler, a dispatch mode, a tensor subclass, a torch.func transform, a tracer, autocast, the profiler. Else it is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ._backend import INTERPRET, implementation

_PLAIN = frozenset((Tensor, Parameter))

_is_compiling = torch.compiler.is_dynamo_compiling  # other compilers bring fake tensors or a dispatch mode
_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_included = torch._C._dispatch_tls_is_dispatch_key_included
_profiling = torch._C._autograd._profiler_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def undisturbed(first: Tensor, *others: Tensor | None) -> str | None:
    """The device type, "cuda" or "cpu", of plain tensors on one device in a call that nobody else has a say in; else None.

    The interpreter's calls, and tensors with the negative bit set (which the dispatcher resolves), are other calls.
    """
    if (
        _is_compiling()
        or _modes()
        or _function_modes()
        or _profiling()
        or _transforms()
        or _any_autocast()
        or forward_ad._current_level >= 0
    ):
        return None
    if _tracing() is not None or (type(first) is not Tensor and type(first) is not Parameter):
        return None
    if first.is_cpu:
        for tensor in others:
            if tensor is not None and (type(tensor) not in _PLAIN or not tensor.is_cpu):
                return None
        return None if INTERPRET else "cpu"
    if not first.is_cuda or first.is_neg() or _included(_PRE_DISPATCH):
        return None
    device = first.get_device()
    for tensor in others:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.get_device() != device or tensor.is_neg()):
            return None
    return "cuda"


def implementations(name: str, reference: Callable[..., Any], launch: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What runs for a raw operator, by device type."""
    return {device: implementation(name, reference, launch, device) for device in ("cpu", "cuda")}


def short_applies(
    function: type[torch.autograd.Function], forward: Callable[..., Any], runs: dict[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """function.apply for undisturbed calls, by device type: without torch's Python wrapper, which is for transforms.

    forward(run, ctx, *args) is the Function's forward, with the implementation it calls as its first argument.
    """

    def apply(run: Callable[..., Any]) -> Callable[..., Any]:
        short = type(function.__name__, (function,), {"forward": staticmethod(functools.partial(forward, run))})
        return super(torch.autograd.Function, short).apply  # type: ignore[misc]

    return {device: apply(run) for device, run in runs.items()}
