"""Whether a forward does no more than its trace shows: its bytecode tells what it reads and writes by name."""

from __future__ import annotations

import dis
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import AbsorbedFunction, function_activation
from .trace import UntraceableError

_CONSTANT_TYPES = (bool, int, float, str, type(None))
_NAMESPACES = frozenset(("torch", "nn", "functional"))
_PURE = frozenset((("transformers.pytorch_utils", "apply_chunking_to_forward"),))
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_")
_READS_STATE = ("is_", "has_", "get_", "handle_")  # is_grad_enabled and its like would be traced as constants


def fixed_code(forward: Any, module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The attributes of module that forward reads and that a trace turns into constants, as (name, value).

    Raises UntraceableError where forward may read anything else that can change.
    """
    constants: dict[str, Any] = {}
    pending, seen = [forward], set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            raise UntraceableError("forward is decorated")
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        if function.__code__.co_freevars or any(isinstance(const, CodeType) for const in function.__code__.co_consts):
            raise UntraceableError("forward has a nested function or a closure")
        for instruction in dis.get_instructions(function):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL":
                value = function.__globals__.get(name)
                if not (_is_torch(name, value) or _is_pure(value)):
                    raise UntraceableError(f"forward uses {name}")
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                pending += _attribute(name, module, constants)
            elif instruction.opname == "FOR_ITER" and function is not nn.Sequential.forward:
                raise UntraceableError("forward loops")  # over what may be longer in the next call
            elif instruction.opname.startswith(_WRITES):
                raise UntraceableError(f"forward writes or imports {name}")
    return tuple(constants.items())


def _attribute(name: str, module: nn.Module, constants: dict[str, Any]) -> list[Any]:
    """The methods that the attribute `name` may lead to, which must be looked into too.

    Where it may be a number or a string of module, it is entered in constants. The bytecode does not say whose attribute it
    is, module's or a tensor's, so both readings must be harmless.
    """
    if name == "training" or name in module._modules or name in module._parameters or name in module._buffers:
        return []
    value = getattr(module, name, module)
    if value is module:
        if _is_torch(name, getattr(F, name, getattr(Tensor, name, None))):
            return []
    elif isinstance(value, _CONSTANT_TYPES) or _is_activation(value):
        constants[name] = value
        return []
    elif isinstance(value, MethodType) and not hasattr(nn.Module, name):
        return [value.__func__]
    raise UntraceableError(f"forward uses {name}")


def _is_pure(value: Any) -> bool:
    """Whether value is one of the functions known to depend on their arguments only."""
    return (getattr(value, "__module__", ""), getattr(value, "__name__", "")) in _PURE


def _is_activation(value: Any) -> bool:
    return isinstance(value, AbsorbedFunction) or (not isinstance(value, nn.Module) and function_activation(value) is not None)


def _is_torch(name: str, value: Any) -> bool:
    """Whether name can only be torch's: a namespace, or a function or method that a trace records."""
    if isinstance(value, ModuleType):
        return value is torch or value is nn or value is F
    if name in _NAMESPACES:
        return True
    recorded = value is not None and any(value is getattr(owner, name, None) for owner in (F, Tensor, torch))
    return recorded and not name.startswith(_READS_STATE) and (hasattr(F, name) or hasattr(Tensor, name))
