"""Tensors that are others' to compute with: subclasses that override torch's functions, fx's proxies, and tensors that the raw
operators do not take.

A public function asks `overrides` when it cannot take its fast path, and returns `overridden`'s result where the answer is yes.
No other place of an op meets such tensors.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .arguments import CLASSES, ordinary, refuse_gradients
from .spec import Op


def overrides(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors overrides torch's functions, or is one that the raw operators do not take."""
    return has_torch_function_variadic(*tensors) or any(_foreign(tensor) for tensor in tensors)


def overridden(spec: Op, tensors: tuple[Tensor | None, ...], *args: Any, **kwargs: Any) -> Any:
    """The public function's result for args and kwargs, whose tensors are those of which `overrides` is true.

    Where the raw operators do not take one of them, the op's torch_fn computes: the same in torch's own functions, which nested,
    sparse and quantised tensors and other libraries' subclasses know. Else a tensor's __torch_function__ decides, and is given
    the public function.

    Raises:
        RuntimeError: torch's functions refuse the tensors; a tensor requires a gradient of an op that has none.
        NotImplementedError (a RuntimeError): torch's functions are not implemented for the tensors.
    """
    with torch._C.DisableTorchFunction():  # a mode sees the public function, not what is read of its tensors
        foreign = any(_foreign(tensor) for tensor in tensors)
    if not foreign:
        return handle_torch_function(spec.public, tuple(t for t in tensors if t is not None), *args, **kwargs)
    if not spec.trains and torch.is_grad_enabled():
        refuse_gradients(spec.public.__name__, _named(spec, args, kwargs))
    if torch.compiler.is_compiling():
        return spec.torch_fn(*args, **kwargs)
    try:
        return spec.torch_fn(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        got = ", ".join(f"{name}: got {_said(tensor)}" for name, tensor in _named(spec, args, kwargs) if _foreign(tensor))
        allowed = f"what torch.nn.functional takes, which says: {str(error).split('. ')[0]}"
        kind = NotImplementedError if isinstance(error, NotImplementedError) else RuntimeError
        raise kind(f"{spec.public.__name__}: {got}, allowed: {allowed}") from error


def _foreign(tensor: Any) -> bool:
    """Whether the raw operators do not take tensor, while torch's own functions find their way by its layout or its class."""
    if not isinstance(tensor, Tensor) or ordinary(tensor):
        return False
    kind = type(tensor)
    return kind in CLASSES or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _named(spec: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors among the arguments, with the names of their parameters."""
    given = inspect.signature(spec.public).bind(*args, **kwargs).arguments
    return [(name, value) for name, value in given.items() if isinstance(value, Tensor)]


def _said(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    if type(tensor) not in CLASSES:
        return f"a tensor of class {type(tensor).__name__}"
    return "a quantised tensor" if tensor.is_quantized else f"a {str(tensor.layout).removeprefix('torch.')} tensor"
