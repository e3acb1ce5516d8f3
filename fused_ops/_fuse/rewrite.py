"""A module's forward replaced by its traced graph with fused calls in it.

This is for what no change of class can fuse: an activation called as a function, a gate multiplied with its other half, a
whole MLP. It is done only where the traced graph is all of the forward: no branch, no nested function, no name that could
read anything but tensors, the module's children and numbers. The original forward stays. It runs whenever a call is not the
one that was traced: an optional argument is given, a child was replaced or hooked, an attribute has changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .._torch.spec import REGISTRY
from . import conditions
from .fixed import fixed_code
from .linears import linear_classes
from .patterns import Chain, Fused, chains
from .trace import UntraceableError, trace_once


@dataclass(frozen=True)
class Program:
    """One traced forward: function(module, *tensors), and what must hold for it to be the module's forward."""

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    children: tuple[tuple[tuple[str, ...], type[nn.Module], tuple[Any, ...]], ...]  # path, class, (activation,) if it has one
    idle: tuple[tuple[str, ...], ...]
    constants: tuple[tuple[str, Any], ...]
    fused: tuple[Fused, ...]
    names: tuple[str, ...]  # of the module's children: a Sequential may grow

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
        if tuple(module._modules) != self.names:
            return False
        for path, cls, activation in self.children:
            child: Any = _child(module, path)
            if type(child) is not cls or "forward" in child.__dict__ or (activation and child.activation != activation[0]):
                return False
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return False
        for path in self.idle:
            dropout: Any = _child(module, path)
            if dropout.training and dropout.p != 0:
                return False
        return all(getattr(module, name) == value for name, value in self.constants)


def _child(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    child: nn.Module | None = module
    for name in path:
        child = None if child is None else child._modules.get(name)  # faster than getattr, which looks elsewhere first
    return child


class FusedForward:
    """Mixin of a module whose forward is replaced. _fuse_programs: whether training -> Program."""

    if TYPE_CHECKING:
        _fuse_wanted: tuple[frozenset[str], frozenset[str]]  # ops, and the paths of the Linears that may be fused
    _fuse_programs: dict[bool, Program] = {}  # noqa: RUF012 (an instance made by the class itself, a slice of a Sequential, has none)

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

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in this module's place: the same children under the original forward."""
        base: Any = _base(type(self))
        unfused = base.__new__(base)
        unfused.__dict__.update({name: value for name, value in self.__dict__.items() if not name.startswith("_fuse_")})
        return unfused

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if "_fuse_wanted" not in state:
            return
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
    child = module.get_submodule(path)
    return conditions.hooks(child) is not None or conditions.replaced_forward(child) is not None


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set module and its dropouts to training or evaluation for a while: whether a dropout is idle depends on it."""
    modules = [module, *(child for child in module.modules() if isinstance(child, nn.Dropout))]
    before = [m.training for m in modules]
    for m in modules:
        m.training = training
    try:
        yield
    finally:
        for m, mode in zip(modules, before):
            m.training = mode


def _program(module: nn.Module, graph: Graph, found: list[Chain], constants: tuple[tuple[str, Any], ...]) -> Program:
    linears = {path: module.get_submodule(path) for chain in found for path in chain.linears}
    for chain in found:
        _replace(graph, chain, linears)
    children = linears | {path: module.get_submodule(path) for chain in found for path in chain.left_out}
    graph.lint()
    arguments = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    return Program(
        function=type(GraphModule(module, graph)).forward,
        arguments=arguments,
        children=tuple((tuple(path.split(".")), type(child), _activation(child)) for path, child in children.items()),
        idle=tuple(tuple(path.split(".")) for chain in found for path in chain.idle),
        constants=constants,
        fused=tuple(chain.fused() for chain in found),
        names=tuple(module._modules),
    )


def _activation(child: nn.Module) -> tuple[Any, ...]:
    """(the activation that a fused Linear applies,), which the program was made for; () for other classes."""
    return (child.activation,) if type(child) in linear_classes().values() else ()


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
        fused = graph.call_function(REGISTRY[chain.op].public, args)
    last.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
