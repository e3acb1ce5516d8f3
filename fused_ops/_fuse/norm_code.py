"""What a forward may touch, read from its bytecode: torch, tensors' methods, numbers, and its module's own attributes."""

from __future__ import annotations

import builtins
import dis
import inspect
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CONSTANTS = (bool, int, float, str, type(None), torch.dtype)
_DTYPES = ("float", "float32", "half", "float16", "bfloat16", "double", "float64")
CASTS = {name: getattr(torch, name) for name in ("float", "half", "bfloat16", "double")}
ALIASES = {"multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "subtract": "sub", "negative": "neg"}
BINARY = ("add", "sub", "mul", "div")
UNARY = ("neg", "reciprocal", "rsqrt", "sqrt")
SHAPES = ("shape", "size", "ndim", "dim", "numel", "device")
RECORDED = frozenset((  # pure functions; those that the formulas lack are recorded all the same, so that a reason can name them
    *BINARY, *UNARY, *ALIASES, *CASTS, "to", "type", "type_as", "pow", "square", "mean", "sum", "var", "std", "norm",
    "vector_norm", "linalg_norm", "linalg_vector_norm", "normalize", "abs", "clamp", "clamp_min", "maximum", "max", "min", "exp",
    "sigmoid", "silu", "contiguous", "unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten", "transpose", "permute",
))  # fmt: skip
_NAMES = frozenset((*RECORDED, *_DTYPES, *SHAPES, "dtype", "nn", "functional", "linalg"))
_EXCEPTIONS = ("AssertionError", "ValueError", "RuntimeError", "TypeError")
_WRITES = (
    "STORE_ATTR",
    "DELETE_ATTR",
    "STORE_GLOBAL",
    "DELETE_GLOBAL",
    "STORE_SUBSCR",
    "DELETE_SUBSCR",
    "STORE_SLICE",
    "IMPORT_",
)
_BLOCKS = (
    "FOR_ITER",
    "PUSH_EXC_INFO",
    "SETUP_FINALLY",
    "SETUP_WITH",
    "BEFORE_WITH",
    "LOAD_SPECIAL",
    "RETURN_GENERATOR",
    "GEN_START",
)


class RefusedError(Exception):
    """forward is not followed; the message says where it stopped."""


class AbsentError(RefusedError):
    """The module has no such attribute."""


def find(module: nn.Module, name: str) -> Any:
    """What self.name is, found without running code of module's class. Raises RefusedError where that is not sure."""
    absent = object()
    of_class = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), absent)
    if hasattr(type(of_class), "__set__"):
        raise RefusedError(f"{name} is a property (a parametrisation is one)")
    for table in (vars(module), {} if of_class is absent else {name: of_class}, module._parameters, module._buffers):
        if name in table:
            return table[name]
    raise AbsentError(f"it uses {name}")


def own_functions(module: nn.Module) -> list[FunctionType]:
    """forward and the functions of module's class that it may call as self.name(...), each once."""
    found: list[FunctionType] = []
    pending = [inspect.unwrap(inspect.getattr_static(type(module), "forward"))]
    while pending:
        function = pending.pop()
        function = function.__func__ if isinstance(function, staticmethod) else function
        if isinstance(function, FunctionType) and function not in found:
            found.append(function)
            for cls in type(module).__mro__:
                if cls not in nn.Module.__mro__:
                    pending += [vars(cls)[name] for name in function.__code__.co_names if name in vars(cls)]
    return found


def check_code(module: nn.Module, functions: list[FunctionType]) -> None:
    """Raise RefusedError unless functions use torch, tensors, numbers and module's attributes only, and write nothing."""
    cls = type(module)
    for method, usual in (
        ("__getattribute__", object),
        ("__getattr__", nn.Module),
        ("__call__", nn.Module),
        ("_call_impl", nn.Module),
    ):
        if getattr(cls, method) is not getattr(usual, method):
            raise RefusedError(f"its class overrides {method}")
    for function in functions:
        code = function.__code__
        if hasattr(function, "__wrapped__"):
            raise RefusedError(f"{code.co_name} is decorated")
        if not all(is_constant(v) for v in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
            raise RefusedError(f"{code.co_name} has an object for a default")
        if code.co_freevars or any(isinstance(const, CodeType) for const in code.co_consts):
            raise RefusedError(f"{code.co_name} has a nested function or a closure (super() is one)")
        previous = ""
        for instruction in dis.get_instructions(function):
            name = instruction.argval
            if instruction.opname.startswith(_WRITES):
                raise RefusedError(f"it writes or imports {name or 'an item'}")
            backwards = instruction.opcode in (*dis.hasjrel, *dis.hasjabs) and name < instruction.offset
            if backwards or instruction.opname.startswith(_BLOCKS):
                raise RefusedError("it loops, catches exceptions or enters a context")
            if code.co_varnames[0] in _stored(instruction):
                raise RefusedError(f"it assigns {code.co_varnames[0]}")
            if instruction.opname == "LOAD_GLOBAL" and not _known_global(name, function):
                raise RefusedError(f"it uses {name}")
            if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and name not in _NAMES:
                _check_attribute(module, name, of_self=previous == code.co_varnames[0])
            previous = ""
            if "LOAD_FAST" in instruction.opname:  # one instruction may load two variables, the second on top
                previous = name[-1] if isinstance(name, tuple) else name


def _stored(instruction: dis.Instruction) -> tuple[str, ...]:
    """The variables that instruction assigns: one may assign two, or assign one and load one."""
    name = instruction.argval
    if not instruction.opname.startswith("STORE_FAST"):
        return ()
    return (name if instruction.opname == "STORE_FAST_STORE_FAST" else name[:1]) if isinstance(name, tuple) else (name,)


def _check_attribute(module: nn.Module, name: str, of_self: bool) -> None:
    try:
        value = find(module, name)
    except AbsentError:
        if of_self:
            return  # on a path not taken: a call that took it would fail
        raise
    tensor = name in module._parameters or name in module._buffers
    if not (tensor or is_constant(value) or isinstance(value, (FunctionType, staticmethod))):
        raise RefusedError(f"it uses {name}")


def _known_global(name: str, function: FunctionType) -> bool:
    if name not in function.__globals__:
        return name in _EXCEPTIONS and hasattr(builtins, name)
    value = function.__globals__[name]
    if isinstance(value, ModuleType):
        return value is torch or value is nn or value is F
    return name in _NAMES and (value is getattr(torch, name, name) or value is getattr(F, name, name))


def is_constant(value: Any) -> bool:
    if type(value) in (tuple, torch.Size):
        return all(is_constant(item) for item in value)
    return isinstance(value, CONSTANTS)
