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

from .._runtime.backend import implementation
from .._runtime.settings import INTERPRET

_PLAIN = frozenset((Tensor, Parameter))

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
    """Which short way a call on these tensors may go: "aten", "cuda", "cpu grad", "cuda grad", or None for none of them.

    "aten": CPU tensors of which none needs a gradient, in a call that nobody watches. One ATen function may take the place
    of the whole call: it knows itself what to do under transforms, forward-mode AD and autocast, and with bad arguments.
    The others: tensors on one device, some of which need a gradient or none, in a call that nobody else has a say in either.
    The implementation for that device may be called directly, with checked arguments.

    The interpreter's calls, and tensors with the negative bit set (which the dispatcher resolves), have no short way.
    """
    if _is_compiling() or _modes() or _function_modes() or _profiling() or _tracing() or type(first) not in _PLAIN:
        return None
    recording = _grad_enabled()
    needed = recording and first.requires_grad
    if first.is_cpu:
        for tensor in others:
            if tensor is not None:
                if type(tensor) not in _PLAIN or not tensor.is_cpu:
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
                if type(tensor) not in _PLAIN or tensor.get_device() != device or tensor.is_neg():
                    return None
                needed = needed or (recording and tensor.requires_grad)
    if _transforms() or _any_autocast() or forward_ad._current_level >= 0:
        return None
    return ("cpu grad" if first.is_cpu else "cuda grad") if needed else "cuda"


def implementations(name: str, reference: Callable[..., Any], launch: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What runs for a raw operator, by the short way that leads to it: "aten" and "cuda"."""
    return {
        "aten": implementation(name, reference, launch, "cpu"),
        "cuda": implementation(name, reference, launch, "cuda"),
    }


def fast_applies(
    function: type[torch.autograd.Function], forward: Callable[..., Any], runs: dict[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """function.apply for "cpu grad" and "cuda grad": without torch's Python wrapper, which is for transforms.

    forward(run, ctx, *args) is the Function's forward, with the implementation it calls as its first argument.
    """

    def apply(run: Callable[..., Any]) -> Callable[..., Any]:
        short = type(function.__name__, (function,), {"forward": staticmethod(functools.partial(forward, run))})
        return super(torch.autograd.Function, short).apply  # type: ignore[misc]

    return {"cpu grad": apply(runs["aten"]), "cuda grad": apply(runs["cuda"])}
