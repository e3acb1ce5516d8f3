"""Argument checks that run before anything is launched. Each message names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Buffer, Parameter

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))

CLASSES = frozenset((Tensor, Parameter, Buffer, FakeTensor, FunctionalTensor))
_DISTRIBUTED = {  # by name, for importing them takes 0.8 s: the class, and the attribute that holds this process's part
    ("torch.distributed.tensor", "DTensor"): "_local_tensor",
    ("torch.distributed._functional_collectives", "AsyncCollectiveTensor"): "elem",
}


def ordinary(tensor: Tensor) -> bool:
    """Whether the raw operators take tensor: it is dense and strided, and of a class that knows every operator.

    So are torch.Tensor, torch.nn.Parameter, the fake and functional tensors of compilers, and a DTensor of such a tensor.
    Not so are nested, sparse, quantised and MKL-DNN tensors, and every other subclass: it may know torch's functions only.
    Works under torch.compile(fullgraph=True); in eager mode it is a look-up and three attributes.
    """
    kind = type(tensor)
    if kind in CLASSES:
        return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    part = _DISTRIBUTED.get((kind.__module__, kind.__name__))
    return part is not None and ordinary(getattr(tensor, part))


def refuse(error: type[Exception], op: str, argument: str, got: object, allowed: str) -> NoReturn:
    raise error(f"{op}: {argument}: got {got}, allowed: {allowed}")


def require_tensor(op: str, argument: str, value: object, optional: bool = False) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        refuse(TypeError, op, argument, type(value).__name__, "a torch.Tensor" + (" or None" if optional else ""))


def require_float(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        refuse(NotImplementedError, op, argument, tensor.dtype, "torch.float32, float16, bfloat16, float64")


def require_device(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        refuse(RuntimeError, op, argument, f"a tensor on {tensor.device}", f"the device of input, {device}")


def require_shape(op: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if not same_shape(tensor.shape, shape):
        refuse(RuntimeError, op, argument, f"shape {tuple(tensor.shape)}", f"shape {tuple(shape)}")


def is_one(size: Any) -> bool:
    """Whether a size is 1. One that depends on data (x[mask], compiled) counts as not 1, whatever it will be."""
    if type(size) is not torch.SymInt and not torch.compiler.is_compiling():  # an int, or a tensor while torch.jit.trace runs
        return bool(size == 1)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(size == 1)


def same_shape(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are equal. Where a size depends on data, it is asserted to be when the compiled function runs."""
    return len(shape) == len(other) and all(_same(m, n) for m, n in zip(shape, other))


def _same(m: Any, n: Any) -> bool:
    if torch.SymInt not in (type(m), type(n)) and not torch.compiler.is_compiling():
        return bool(m == n)
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    if guard_or_false(m == n):
        return True
    if not guard_or_true(m == n):
        return False
    torch._check(m == n)
    return True


def refuse_gradients(op: str, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Refuse a tensor that requires a gradient while gradients are recorded: for ops that have none."""
    if torch.is_grad_enabled():
        for name, tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                refuse(RuntimeError, op, name, "a tensor that requires a gradient", "inference: torch.no_grad(), or detach()")


def normalize_dim(op: str, dim: int, rank: int) -> int:
    """dim as a number from 0; a 0-d tensor counts as one dimension, as in ATen."""
    rank = max(rank, 1)
    if not isinstance(dim, int):
        refuse(TypeError, op, "dim", f"{dim!r} of type {type(dim).__name__}", "an int")
    if not -rank <= dim < rank:
        refuse(IndexError, op, "dim", dim, f"a number from {-rank} to {rank - 1}")
    return dim + rank if dim < 0 else dim
