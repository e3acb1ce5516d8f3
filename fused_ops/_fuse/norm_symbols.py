"""What a norm's forward computes, from running it once on symbols: no call of the module, no tensor, nothing of the process touched.

The function, whose bytecode norm_code has checked, is called with a stand-in for self and a symbol for the input. Both have
definite dtypes, so that every rounding is a node, and a branch on a dtype goes the way it would go.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .norm_code import ALIASES, BINARY, CASTS, RECORDED, SHAPES, UNARY, RefusedError, find, is_constant


class Node:
    """One operation on one dtype. Within a run equal nodes are one object."""

    def __init__(self, op: str, args: tuple[Any, ...], dtype: torch.dtype) -> None:
        self.op, self.args, self.dtype = op, args, dtype


class Run:
    """One symbolic call of module's forward: out, or RefusedError raised. Parameters and buffers are of dtype weight."""

    def __init__(
        self, module: nn.Module, functions: list[FunctionType], input: torch.dtype, weight: torch.dtype, answer: bool = False
    ) -> None:
        self.module, self.functions, self.weight, self.answer = module, functions, weight, answer
        self.asked = False  # whether forward branched on a shape or a value
        self.fixed: dict[str, Any] = {}  # the attributes that the graph holds by value
        self._nodes: dict[Any, Node] = {}
        self._numbers: dict[str, Number] = {}
        self.x = self.node("input", (), input)
        out = functions[0](StandIn(self), Symbol(self, self.x))
        if not isinstance(out, Symbol):
            raise RefusedError("it does not return one tensor")
        self.out = out.node

    def node(self, op: str, args: tuple[Any, ...], dtype: torch.dtype) -> Node:
        key = op, tuple(id(a) if isinstance(a, (Node, Number)) else repr(a) for a in args), dtype
        return self._nodes.setdefault(key, Node(op, args, dtype))

    @property
    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def attribute(self, name: str, stand_in: StandIn) -> Any:
        value = find(self.module, name)
        if name == "training":
            raise RefusedError("it differs between training and evaluation")
        for kind in ("parameter", "buffer"):
            if value is not None and name in getattr(self.module, f"_{kind}s"):
                return Symbol(self, self.node(kind, (name,), self.weight))
        if name not in vars(self.module):
            if isinstance(value, staticmethod) and value.__func__ in self.functions:
                return value.__func__
            if value in self.functions:
                return MethodType(value, stand_in)
        if not is_constant(value):
            raise RefusedError(f"it uses {name}")
        if type(value) is float:
            return self._numbers.setdefault(name, Number(self, name, value))
        self.fixed[name] = value
        return value

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if node.dtype is dtype else self.node("cast", (node,), dtype)

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
        """The symbol of one operation, in the form that its other spellings share."""
        name = ALIASES.get(name, name)
        if name not in RECORDED:
            raise RefusedError(f"it uses {name}")
        operands = tuple(a.node if isinstance(a, Symbol) else a for a in args)
        return Symbol(self, self._canonical(name, operands, kwargs))

    def _canonical(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        first, rest = args[0], args[1:]
        if name in ("to", "type", "type_as", *CASTS):
            target = [CASTS[name]] if name in CASTS else [*rest, *kwargs.values()]
            if len(target) == 1 and set(kwargs) <= {"dtype", "other"}:
                target = [t.dtype if isinstance(t, (Node, Symbol)) else t for t in target]
                if isinstance(target[0], torch.dtype):
                    return self.cast(first, target[0])
        elif len(args) == 2 and not kwargs and (first is rest[0] if name == "mul" else name == "pow" and rest[0] == 2):
            return self.node("square", (first,), first.dtype)
        elif name == "mean":
            given = {**dict(zip(("dim", "keepdim"), rest)), **{"dim" if k == "axis" else k: v for k, v in kwargs.items()}}
            if given in ({"dim": dim, "keepdim": True} for dim in (-1, (-1,), [-1])):
                return self.node("mean", (first,), first.dtype)
        dtypes = [a.dtype for a in args if isinstance(a, Node)]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        if name in BINARY and len(args) == 2 and not kwargs:
            return self.node(name, tuple(self.cast(a, dtype) if isinstance(a, Node) else a for a in args), dtype)
        if (name in UNARY or name == "square") and len(args) == 1:
            return self.node(name, args, dtype)
        if name == "pow" and len(args) == 2 and not kwargs:
            return self.node("pow", args, dtype)
        return self.node("mean()" if name == "mean" else name, (*args, *kwargs.items()), dtype)


class StandIn:
    """Stands for self while forward runs: reads module's attributes, and writes none."""

    __slots__ = ("_fuse_run",)

    def __init__(self, run: Run) -> None:
        object.__setattr__(self, "_fuse_run", run)

    def __getattr__(self, name: str) -> Any:
        return self._fuse_run.attribute(name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RefusedError(f"it writes {name}")

    __delattr__ = __setattr__  # type: ignore[assignment]


class Symbol:
    """Stands for a tensor: records what is done with it."""

    def __init__(self, run: Run, node: Node) -> None:
        self._run, self.node, self.dtype = run, node, node.dtype

    def __getattr__(self, name: str) -> Any:
        if name in SHAPES:
            return Unknown(self._run)
        return lambda *args, **kwargs: self._run.call(name, (self, *args), kwargs)

    def __neg__(self) -> Symbol:
        return self._run.call("neg", (self,), {})

    def __getitem__(self, index: Any) -> Symbol:
        return Symbol(self._run, self._run.node("[]", (self.node, index), self.dtype))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        symbols = [a for a in args if isinstance(a, Symbol)]
        if not symbols:
            raise RefusedError(f"it calls {func.__name__} with keywords only")
        return symbols[0]._run.call(func.__name__.strip("_"), args, kwargs or {})


class Unknown:
    """A shape, or the answer to a comparison: what forward makes of it is not followed, but for a branch."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __bool__(self) -> bool:
        self._run.asked = True
        return self._run.answer

    def __iter__(self) -> Any:
        raise RefusedError("it works on parts of the input's shape (groups or heads)")

    def _unknown(self, *args: Any) -> Unknown:
        return Unknown(self._run)

    __call__ = __getitem__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _unknown  # type: ignore[assignment]
    __floordiv__ = __mul__ = __sub__ = _unknown
    __hash__ = None  # type: ignore[assignment]


class Number(float):
    """A float attribute of the module, by name; any use but as an operand of a symbol fixes its value in the graph."""

    name: str
    run: Run

    def __new__(cls, run: Run, name: str, value: float) -> Number:
        self = super().__new__(cls, value)
        self.run, self.name = run, name
        return self


def _operator(name: str, swapped: bool) -> Callable[..., Any]:
    def method(self: Symbol, other: Any) -> Symbol:
        return self._run.call(name, (other, self) if swapped else (self, other), {})

    return method


def _in_place(self: Symbol, other: Any) -> Symbol:
    raise RefusedError("it changes a tensor in place")


def _compared(self: Symbol, other: Any) -> Unknown:
    return Unknown(self._run)


def _fixing(method: str) -> Callable[..., Any]:
    def fixed(self: Number, *args: Any) -> Any:
        if args and isinstance(args[0], Symbol):
            return NotImplemented
        self.run.fixed[self.name] = float.__float__(self)
        return getattr(float, method)(self, *args)

    return fixed


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(Symbol, f"__{_name}__", _operator(_name, False))
    setattr(Symbol, f"__r{_name}__", _operator(_name, True))
    setattr(Symbol, f"__i{_name}__", _in_place)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Symbol, f"__{_name}__", _compared)
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Number, f"__{_name}__", _fixing(f"__{_name}__"))
    setattr(Number, f"__r{_name}__", _fixing(f"__r{_name}__"))
for _name in (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "neg",
    "pos",
    "abs",
    "bool",
    "float",
    "int",
    "hash",
    "round",
    "trunc",
    "repr",
):
    setattr(Number, f"__{_name}__", _fixing(f"__{_name}__"))
