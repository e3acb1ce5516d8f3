"""Argument checks that run before anything is launched. Each message names the argument, what came and what is allowed."""

from __future__ import annotations

import numbers
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


_LONGEST = 100  # characters of a message about what came
_SCALARS = (type(None), bool, int, float, complex, torch.dtype, torch.device, torch.layout)


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
    """Raise error in the words of all refusals. got: the value itself, or words about it; one short line is made of either."""
    words = _shortened(got) if isinstance(got, str) else said(got)
    raise error(f"{op}: {argument}: got {words}, allowed: {_shortened(allowed, 2 * _LONGEST)}")


def refuse_type(op: str, argument: str, value: object, allowed: str) -> NoReturn:
    """Refuse a value for its type."""
    words = said(value)
    refuse(TypeError, op, argument, words if words[:2] in ("a ", "an") else f"{words} of type {type(value).__name__}", allowed)


def said(value: object) -> str:
    """A value in one line of at most 100 characters, whatever it is: of a tensor, an array or a long list, what it is."""
    try:
        return _shortened(_said(value))
    except Exception:  # a shape or a repr that raises
        return _shortened(f"an object of type {type(value).__name__}")


def _said(value: Any) -> str:
    kind = type(value)
    if isinstance(value, Tensor):
        return f"a {kind.__name__} of shape {tuple(value.shape)} and {value.dtype}"
    if kind is str:
        return repr(value[:_LONGEST])
    if kind in (dict, set, frozenset):
        return f"a {kind.__name__} of {len(value)} elements"
    if kind in (list, tuple, torch.Size):
        few = len(value) <= 8 and all(type(e) in _SCALARS or (type(e) is str and len(e) <= _LONGEST) for e in value)
        return repr(value) if few else f"a {kind.__name__} of {len(value)} elements"
    if kind in _SCALARS or isinstance(value, numbers.Number):
        return repr(value)
    if isinstance(value, type):
        return f"a class, {value.__name__}"
    return f"an object of type {kind.__name__}"


def _shortened(words: str, most: int = _LONGEST) -> str:
    words = " ".join(words[: 2 * most].split())
    return words if len(words) <= most else words[: most - 3] + "..."


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


def require_bool(op: str, argument: str, value: Any) -> bool:
    """value, a bool of Python's or numpy's; TypeError for anything else."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    refuse_type(op, argument, value, "a bool")


def require_int(op: str, argument: str, value: Any) -> int:
    """value as an int, where torch's own functions take it for one: an int of Python's, numpy's or a compiler's, or a tensor of
    one integer without dimensions; no bool. TypeError for anything else, RuntimeError for a tensor whose value is not known."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if torch.compiler.is_compiling() and type(value).__module__ == "numpy":  # to a compiler, an array
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        if value.dim() == 0 and value.dtype is not torch.bool and not (value.is_floating_point() or value.is_complex()):
            return _known(op, argument, value)
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    refuse_type(op, argument, value, "an int")


def _known(op: str, argument: str, value: Tensor) -> int:
    if torch.compiler.is_compiling():
        return int(value.item())
    try:
        return int(value.item())
    except Exception:  # under vmap, on the meta device, or of a fake tensor
        refuse(RuntimeError, op, argument, f"{said(value)} whose value is not known here", "an int")


def require_dtype(
    op: str, argument: str, value: Any, allowed: Sequence[torch.dtype], error: type[Exception], optional: bool = False
) -> None:  # fmt: skip
    """Refuse what is none of the allowed dtypes: with TypeError where it is no dtype, with error where it is another."""
    if optional and value is None:
        return
    names = ", ".join(map(str, allowed)) + (", or None" if optional else "")
    if not isinstance(value, torch.dtype):
        refuse_type(op, argument, value, names)
    if value not in allowed:
        refuse(error, op, argument, value, names)


def normalize_dim(op: str, dim: Any, rank: int) -> int:
    """dim, which `require_int` takes, as a number from 0; a 0-d tensor counts as one dimension, as in ATen."""
    dim, rank = require_int(op, "dim", dim), max(rank, 1)
    if not -rank <= dim < rank:
        refuse(IndexError, op, "dim", dim, f"a number from {-rank} to {rank - 1}")
    return dim + rank if dim < 0 else dim
