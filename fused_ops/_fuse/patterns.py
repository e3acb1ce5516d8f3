"""Chains in a traced forward that one fused call can replace: act(linear(x)), act(gate(x)) * up(x), linear(act(linear(x)))."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from .activations import Absorbed
from .linears import linear_classes
from .match import activation_at

_MUL = (operator.mul, operator.imul, torch.mul)


@dataclass(frozen=True)
class Fused:
    """What one fused call stands for: op, activation, the Linears' paths, and the dropouts that must do nothing."""

    op: str
    activation: str
    linears: tuple[str, ...]
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """One chain of a traced forward that one fused call can replace.

    linears: paths, in the order in which the fused function takes the weights. nodes: in graph order; the last one is the
    result. left_out: paths of the other modules that the fused call makes superfluous. idle: those of them that are
    dropouts, which must do nothing.
    """

    op: str
    activation: str
    linears: tuple[str, ...]
    x: Any
    nodes: tuple[Node, ...]
    left_out: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    def fused(self) -> Fused:
        return Fused(self.op, self.activation, self.linears, self.idle)


@dataclass(frozen=True)
class Activated:
    """act(linear(x)), whichever of the two modules applies the activation."""

    activation: str
    linear: Node
    nodes: tuple[Node, ...]


def chains(module: nn.Module, graph: Graph, ops: frozenset[str]) -> list[Chain]:
    """The chains of graph for ops, larger ones first; no node is in two."""
    found: list[Chain] = []
    taken: set[Node] = set()
    for op, match in PATTERNS.items():
        for node in graph.nodes if op in ops else ():
            chain = match(module, node)
            if chain is not None and taken.isdisjoint(chain.nodes):
                found.append(chain)
                taken.update(chain.nodes)
    return found


def _linear(module: nn.Module, node: Node) -> Chain | None:
    """An activation function on an unfused Linear, which no change of class can fuse."""
    if node.op not in ("call_function", "call_method"):
        return None
    found = _activated(module, node)
    if found is None or not _unfused_linear(module, found.linear):
        return None
    return Chain("linear", found.activation, (str(found.linear.target),), found.linear.args[0], found.nodes)


def _gated(module: nn.Module, node: Node) -> Chain | None:
    if not (_is_mul(node) and len(node.args) == 2):
        return None
    for gate_node, up in (node.args, node.args[::-1]):
        if not (isinstance(gate_node, Node) and isinstance(up, Node) and len(gate_node.users) == len(up.users) == 1):
            continue
        gate = _activated(module, gate_node)
        if gate is None or not _unfused_linear(module, up) or up.args != gate.linear.args:
            continue
        nodes = (*gate.nodes, up, node)
        return Chain(
            "gated_linear",
            gate.activation,
            (str(gate.linear.target), str(up.target)),
            up.args[0],
            nodes,
            _modules(gate.nodes[1:]),
        )
    return None


def _mlp(module: nn.Module, node: Node) -> Chain | None:
    if not _unfused_linear(module, node):
        return None
    if not module.training:  # in evaluation a fused MLP saves nothing over its first half: cuBLAS does the second
        return None
    between: list[Node] = []
    before = node.args[0]
    while isinstance(before, Node) and len(before.users) == 1 and _does_nothing(module, before):
        between.insert(0, before)
        before = before.args[0]
    if not isinstance(before, Node) or len(before.users) != 1:
        return None
    first = _activated(module, before)
    if first is None:
        return None
    paths = (str(first.linear.target), str(node.target))
    rest = (*first.nodes[1:], *between)
    idle = tuple(str(n.target) for n in between if isinstance(_called(module, n), nn.Dropout))
    return Chain("mlp", first.activation, paths, first.linear.args[0], (first.linear, *rest, node), _modules(rest), idle)


def _activated(module: nn.Module, node: Node) -> Activated | None:
    """node as act(linear(x)): a FusedLinear and absorbed activations, or an activation function on an unfused Linear."""
    nodes: list[Node] = []
    while _is_absorbed(module, node) and isinstance(before := node.args[0], Node) and len(before.users) == 1:
        nodes.insert(0, node)
        node = before
    called: Any = _called(module, node)
    if type(called) in linear_classes().values() and called.activation is not None and _one_input(node):
        return Activated(called.activation, node, (node, *nodes))
    if (found := activation_at(module, node)) is None or not node.args:
        return None
    linear = node.args[0]
    if not (isinstance(linear, Node) and len(linear.users) == 1 and _unfused_linear(module, linear)):
        return None
    return Activated(found.activation, linear, (linear, node, *nodes))


def _called(module: nn.Module, node: Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _one_input(node: Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs


def _unfused_linear(module: nn.Module, node: Node) -> bool:
    called: Any = _called(module, node)
    known = linear_classes()
    bare = type(called) in known or (type(called) in known.values() and called.activation is None)
    return bare and _one_input(node)


PATTERNS = {"mlp": _mlp, "gated_linear": _gated, "linear": _linear}
"""{op: what finds a chain that it replaces, at its last node}, larger ones first."""


def _is_absorbed(module: nn.Module, node: Node) -> bool:
    return isinstance(_called(module, node), Absorbed)


def _is_mul(node: Node) -> bool:
    return (node.op == "call_function" and node.target in _MUL) or (node.op == "call_method" and node.target == "mul")


def _does_nothing(module: nn.Module, node: Node) -> bool:
    """Whether node passes its one input on: an Identity, or a dropout that is idle now."""
    called = _called(module, node)
    if isinstance(called, nn.Dropout):
        return type(called) is nn.Dropout and _one_input(node) and (not called.training or called.p == 0)
    if node.op == "call_function" and node.target is F.dropout:
        options: dict[str, Any] = dict(zip(("p", "training"), node.args[1:]), **node.kwargs)
        return options.get("training", True) is False or options.get("p", 0.5) == 0
    return type(called) is nn.Identity and _one_input(node)


def _modules(nodes: tuple[Node, ...]) -> tuple[str, ...]:
    """The paths of the modules among nodes."""
    return tuple(str(node.target) for node in nodes if node.op == "call_module")
