"""A module's forward replaced by its traced graph with fused calls in it.

This is for what no class swap can reach: an activation called as a function, a gate multiplied with its other half, a
whole MLP. It is done only where the traced graph is the forward: no branch, no nested function, no name that could read
anything but tensors, the module's children and plain numbers. The original forward stays, and runs whenever the call is
not the one that was traced: an optional argument given, a child replaced or hooked, an attribute changed.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from . import conditions
from .activations import AbsorbedFunction, function_activation
from .patterns import Chain, Fused, chains
from .trace import UntraceableError, trace_once

_PLAIN = (bool, int, float, str, type(None))
_NAMESPACES = frozenset(("torch", "nn", "functional"))
_PURE = frozenset((("transformers.pytorch_utils", "apply_chunking_to_forward"),))
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_")
_READS_STATE = ("is_", "has_", "get_", "handle_")  # is_grad_enabled and its like would be traced as constants


def fused_functions() -> dict[str, Callable[..., Tensor]]:
    """op -> the function that a chain becomes, for those that this version of fused_ops has."""
    import fused_ops

    names = {"linear": "fused_linear", "gated_linear": "fused_gated_linear", "mlp": "fused_mlp"}
    return {op: getattr(fused_ops, name) for op, name in names.items() if hasattr(fused_ops, name)}


@dataclass(frozen=True)
class Program:
    """One traced forward: function(module, *tensors), and what must hold for it to be the module's forward."""

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    children: tuple[tuple[str, type[nn.Module], str | None], ...]  # path, class, activation of those it works for
    idle: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    fused: tuple[Fused, ...]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The call's tensors in order, or None when it is not the traced call."""
        if kwargs:
            if set(self.arguments[len(args) :]) != set(kwargs):
                return None
            args = (*args, *[kwargs[name] for name in self.arguments[len(args) :]])
        if len(args) != len(self.arguments) or not all(isinstance(a, Tensor) for a in args):
            return None
        return args

    def fits(self, module: nn.Module) -> bool:
        for path, cls, activation in self.children:
            child = _child(module, path)
            if type(child) is not cls or getattr(child, "activation", None) != activation or "forward" in child.__dict__:
                return False
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return False
        for path in self.idle:
            dropout = _child(module, path)
            if dropout.training and dropout.p != 0:
                return False
        return all(getattr(module, name) == value for name, value in self.constants)


def _child(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


class FusedForward:
    """Mixin of a module whose forward is replaced. _fuse_programs: whether training -> Program."""

    _fuse_wanted: tuple[frozenset[str], frozenset[str]]  # ops, and the paths of the Linears that may be fused
    _fuse_programs: dict[bool, Program]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self._fuse_programs.get(self.training)  # type: ignore[attr-defined]
        if program is not None:
            tensors = program.bind(args, kwargs)
            if tensors is not None and program.fits(self):  # type: ignore[arg-type]
                return program.function(self, *tensors)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_fuse_programs"}
        return _bare, (_base(type(self)),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        try:
            self.__dict__["_fuse_programs"] = programs(self, *self._fuse_wanted)  # type: ignore[arg-type]
        except UntraceableError:
            self.__dict__["_fuse_programs"] = {}


@functools.cache
def forward_class(base: Any) -> type[nn.Module]:
    """base with FusedForward before it. Instances pickle by base, so the class needs no importable name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedForward.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]  # torch.export and callers read it
    members = {"__module__": base.__module__, "__doc__": base.__doc__, "_fuse_base_forward": base.forward, "forward": forward}
    return type(f"Fused{base.__name__}", (FusedForward, base), members)


def _base(cls: type) -> type:
    return cls.__mro__[cls.__mro__.index(FusedForward) + 1]


def _bare(base: type[nn.Module]) -> nn.Module:
    cls = forward_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def find(module: nn.Module, ops: frozenset[str], allowed: frozenset[str]) -> list[Fused]:
    """What a new forward of module could fuse, in evaluation and in training; nothing when it cannot be traced."""
    found: list[Fused] = []
    try:
        for training in (False, True):
            with _mode(module, training):
                graph, _ = trace_once(module, training, _entry(module))
                found += [chain.fused() for chain in _chains(module, graph, ops, allowed)]
    except UntraceableError:
        return []
    return list(dict.fromkeys(found))


def programs(module: nn.Module, ops: frozenset[str], allowed: frozenset[str]) -> dict[bool, Program]:
    """module's programs in evaluation and in training, where they fuse something; UntraceableError says why there are none."""
    entry = _entry(module)
    constants = fixed_code(getattr(type(module), entry), module)
    made: dict[bool, Program] = {}
    for training in (False, True):
        with _mode(module, training):
            graph, branches = trace_once(module, training, entry)
            if branches:
                raise UntraceableError("forward branches on a tensor")
            if found := _chains(module, graph, ops, allowed):
                made[training] = _program(module, graph, found, constants)
    return made


def _entry(module: nn.Module) -> str:
    return "_fuse_base_forward" if isinstance(module, FusedForward) else "forward"


def _chains(module: nn.Module, graph: Graph, ops: frozenset[str], allowed: frozenset[str]) -> list[Chain]:
    found = chains(module, graph, ops)
    return [c for c in found if allowed.issuperset(c.linears) and not any(_busy(module, path) for path in c.left_out)]


def _busy(module: nn.Module, path: str) -> bool:
    """Whether the module at path, which is no Linear, does more than its class says."""
    child = _child(module, path)
    return conditions.hooks(child) is not None or conditions.replaced_forward(child) is not None


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """module and its own children in training or evaluation: what an idle dropout is depends on it."""
    modules = [module, *(child for child in module.modules() if isinstance(child, nn.Dropout))]
    before = [m.training for m in modules]
    for m in modules:
        m.training = training
    try:
        yield
    finally:
        for m, mode in zip(modules, before):
            m.training = mode


def fixed_code(forward: Any, module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The plain attributes that forward reads and a trace makes constants of; UntraceableError when it may read more."""
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
            elif instruction.opname.startswith(_WRITES):
                raise UntraceableError(f"forward writes or imports {name}")
    return tuple(constants.items())


def _attribute(name: str, module: nn.Module, constants: dict[str, Any]) -> list[Any]:
    """What .name may be: constants gets a plain attribute of module; returned is a method of its own, to look into.

    The code does not say whose attribute it is, module's or a tensor's: whatever it may be must be harmless.
    """
    if name == "training" or name in module._modules or name in module._parameters or name in module._buffers:
        return []
    value = getattr(module, name, module)
    if value is module:
        if _is_torch(name, getattr(F, name, getattr(Tensor, name, None))):
            return []
    elif isinstance(value, _PLAIN) or _is_activation(value):
        constants[name] = value
        return []
    elif isinstance(value, MethodType) and not hasattr(nn.Module, name):
        return [value.__func__]
    raise UntraceableError(f"forward uses {name}")


def _is_pure(value: Any) -> bool:
    """Whether value is a function whose result depends on its arguments only, known by name: it calls what it is given."""
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


def _program(module: nn.Module, graph: Graph, found: list[Chain], constants: tuple[tuple[str, Any], ...]) -> Program:
    linears = {path: _child(module, path) for chain in found for path in chain.linears}
    for chain in found:
        _replace(graph, chain, linears)
    children = linears | {path: _child(module, path) for chain in found for path in chain.left_out}
    graph.lint()
    arguments = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    return Program(
        function=type(GraphModule(module, graph)).forward,
        arguments=arguments,
        children=tuple((path, type(child), getattr(child, "activation", None)) for path, child in children.items()),
        idle=tuple(path for chain in found for path in chain.idle),
        constants=constants,
        fused=tuple(chain.fused() for chain in found),
    )


def _weight(graph: Graph, path: str, linear: nn.Module) -> Node:
    """The weight as (out, in)."""
    weight = graph.get_attr(f"{path}.weight")
    return weight if isinstance(linear, nn.Linear) else graph.call_method("t", (weight,))  # transformers' Conv1D is (in, out)


def _replace(graph: Graph, chain: Chain, linears: dict[str, nn.Module]) -> None:
    """Put the fused call where chain's result is, and take chain's nodes out."""
    last = chain.nodes[-1]
    with graph.inserting_before(last):
        weights = [_weight(graph, path, linears[path]) for path in chain.linears]
        biases = [graph.get_attr(f"{path}.bias") if linears[path].bias is not None else None for path in chain.linears]
        if chain.op == "linear":
            args: tuple[Any, ...] = (chain.x, *weights, *biases, chain.activation)
        elif chain.op == "gated_linear":
            args = (chain.x, *weights, chain.activation, *biases)
        else:
            args = (chain.x, weights[0], biases[0], weights[1], biases[1], chain.activation)
        fused = graph.call_function(fused_functions()[chain.op], args)
    last.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
