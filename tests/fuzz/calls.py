"""A call of a public op as data, and what the registry says of the op's parameters."""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import Op, Sample, roles_of

from .forms import Form

KINDS = {Tensor: "tensor", int: "dim", list[int]: "shape", float: "eps", str: "name", torch.dtype: "dtype", bool: "flag"}


UNIT = Form(torch.float32)


class Parameter(NamedTuple):
    """A parameter of a public function.

    kind: one of KINDS. role: a tensor's letter of Roles. dtype: that of a tensor that has the same in every sample. named: it
    is given by keyword only.
    """

    name: str
    kind: str
    optional: bool
    named: bool
    role: str = ""
    dtype: torch.dtype | None = None


@functools.cache
def parameters(name: str) -> tuple[Parameter, ...]:
    """The parameters of an op's public function. TypeError for an annotation of which nothing is known here."""
    op = REGISTRY[name]
    hints, signature = typing.get_type_hints(op.public), inspect.signature(op.public)
    roles, dtypes = _roles(op)
    found = []
    for key, parameter in signature.parameters.items():
        options = typing.get_args(hints[key]) if typing.get_origin(hints[key]) in (typing.Union, types.UnionType) else ()
        (hint,) = [option for option in options if option is not type(None)] or [hints[key]]
        if hint not in KINDS:
            raise TypeError(f"{op.public.__name__}: {key}: nothing is drawn for a parameter annotated {hint}")
        kind = KINDS[hint]
        named = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        extra = (roles[key], dtypes[key]) if kind == "tensor" else ("", None)
        found.append(Parameter(key, kind, type(None) in options, named, *extra))
    return tuple(found)


def _roles(op: Op) -> tuple[dict[str, str], dict[str, torch.dtype | None]]:
    def tensors(dtype: torch.dtype) -> tuple[Sample, dict[str, Tensor]]:
        samples = (s for s in op.samples("cpu", dtype) if all(a.numel() for a in s.args if isinstance(a, Tensor)))
        sample = max(samples, key=lambda s: sum(isinstance(a, Tensor) for a in s.args))
        bound = inspect.signature(op.public).bind(*sample.args, **sample.kwargs).arguments
        return sample, {key: value for key, value in bound.items() if isinstance(value, Tensor)}

    sample, first = tensors(torch.float32)
    _, second = tensors(torch.bfloat16)
    roles = dict(zip(first, roles_of(op, sample)))
    return roles, {key: t.dtype if t.dtype is second[key].dtype else None for key, t in first.items()}


@dataclass(frozen=True)
class Call:
    """A call: sizes, the forms of its tensors, its other arguments, the way it is made, and the argument that is wrong.

    lead: the input's leading dimensions. inner: the dimensions that K stands for. n, z: the columns of the first and the second
    product. tensors: a Form, or None, for each tensor. options: the other arguments; a shape is "list", "tuple", "size" or
    "int", and a dimension is brought into range. needs: the tensors that need a gradient, or that a transform is over.
    dy_dtype: what dy is rounded to, where it is not the output's own dtype. scales: the form of a scale: 0 one element, 1 one a row, 2 with a dimension more. positional: arguments without a name.
    """

    op: str
    lead: tuple[int, ...]
    inner: tuple[int, ...]
    n: int = 1
    z: int = 1
    tensors: dict[str, Form | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    way: str = "no_grad"
    needs: tuple[str, ...] = ()
    dy: Form = UNIT
    dy_dtype: torch.dtype | None = None
    scales: int = 1
    positional: bool = True
    fault: tuple[str, str] | None = None

    @property
    def spec(self) -> Op:
        return REGISTRY[self.op]

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        k = math.prod(self.inner)
        if parameter.role == "q":
            operand = next(p for p in parameters(self.op) if p.name == parameter.name.removesuffix("_scale"))
            rows = self.shape_of(operand)[:-1]
            return () if not self.scales else (*rows, 1) if self.scales == 2 else rows
        shapes = {
            "x": (*self.lead, *self.inner), "w": (self.n, k), "b": (self.n,), "W": (self.z, self.n), "B": (self.z,),
            "v": self.inner,
        }  # fmt: skip
        return shapes[parameter.role]

    def build(self) -> dict[str, Any]:
        """The arguments by name, every tensor made anew."""
        return {p.name: self._value(p) for p in parameters(self.op)}

    def _value(self, parameter: Parameter) -> Any:
        if parameter.kind == "tensor":
            form = self.tensors[parameter.name]
            return None if form is None else form.build(self.shape_of(parameter))
        value = self.options[parameter.name]
        if parameter.kind == "shape":
            make: dict[str, Callable[[Any], Any]] = {
                "list": list,
                "tuple": tuple,
                "size": torch.Size,
                "int": lambda inner: inner[0],
            }
            return make[value](self.inner)
        if parameter.kind == "dim":
            rank = max(len(self.lead) + len(self.inner), 1)
            return max(-rank, min(value, rank - 1))
        return value

    def __str__(self) -> str:
        """The call in words, for people: shapes, and what is special about each tensor."""
        parts = []
        for p in parameters(self.op):
            if p.kind != "tensor":
                parts.append(f"{p.name}={self._value(p)!r}")
            elif (form := self.tensors[p.name]) is not None:
                said = [str(form.dtype)[6:], f"{list(self.shape_of(p))}"]
                said += [form.layout] * (form.layout != "contiguous") + [form.values] * (form.values != "normal")
                said += [f"scale {form.scale:g}"] * (form.scale != 1.0)
                said += ["needs grad"] * (p.name in self.needs)
                parts.append(f"{p.name}=<{' '.join(said)}>")
        said = [self.way] + [f"dy {self.dy.layout} {self.dy.values}"] * bool(self.needs)
        if self.fault is not None:
            said.append(f"wrong: {' '.join(self.fault)}")
        return f"{self.spec.public.__name__}({', '.join(parts)}) [{', '.join(said)}]"


def function_of(function: Callable[..., Any], call: Call, arguments: dict[str, Any]) -> Callable[[dict[str, Any]], list[Any]]:
    """function as one of the tensors, by name, which answers its results in a list; the other arguments are bound.

    They are given by position or by name as the call says. torch.compile can trace it.
    """
    first = [p.name for p in parameters(call.op) if call.positional and not p.named]
    rest = [p.name for p in parameters(call.op) if p.name not in first]
    others = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}

    def of(tensors: dict[str, Any]) -> list[Any]:
        given = {**others, **tensors}
        result = function(*[given[name] for name in first], **{name: given[name] for name in rest})
        return list(result) if isinstance(result, tuple) else [result]

    return of
