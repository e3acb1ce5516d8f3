"""Which Linears of a module are followed by an activation that they can apply themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

from torch import nn
from torch.fx import Graph, Node

from .activation_classes import module_activation
from .activations import METHODS, function_activation
from .trace import Held


@dataclass(frozen=True)
class Site:
    """Where an activation is applied.

    kind is "module" (name: a child's path), "held" (name: an attribute that holds a function), or "call" (a function called
    by name).
    """

    kind: str
    name: str


@dataclass(frozen=True)
class Match:
    """A Linear to be fused with activation, which is applied at site everywhere the Linear's output goes."""

    activation: str
    site: Site


Verdict = Union[Match, str]  # a string is the reason why not


def match_linears(parent: nn.Module, graphs: list[Graph], linears: set[str], fixed: dict[str, str]) -> dict[str, Verdict]:
    """For each child path in linears: a Match, or the reason why there is none.

    graphs: every path through parent's forward (trace.paths). fixed: child path -> why that activation module must stay as
    it is.
    """
    verdicts: dict[str, Verdict] = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_module" and node.target in linears:
                verdict = _follow(parent, node, fixed)
                before = verdicts.get(node.target, verdict)
                verdicts[node.target] = verdict if before == verdict else _disagree(before, verdict)
    for linear in linears - set(verdicts):
        verdicts[linear] = f"{type(parent).__name__} does not call it as a module"
    while stray := _stray_uses(graphs, verdicts):
        verdicts.update(stray)
    return verdicts


def _disagree(before: Verdict, now: Verdict) -> str:
    return next((v for v in (before, now) if isinstance(v, str)), "different activations follow it on different paths")


def _follow(parent: nn.Module, node: Node, fixed: dict[str, str]) -> Verdict:
    """What follows one call of a Linear."""
    users = list(node.users)
    if len(users) != 1:
        return "its output is not used" if not users else f"its output has {len(users)} users"
    user = users[0]
    found = activation_at(parent, user)
    if found is None:
        return f"no activation follows ({_describe(parent, user)} does)"
    if user.args[:1] != (node,):
        return f"its output is not the only input of {_describe(parent, user)}"
    if found.site.kind == "module" and found.site.name in fixed:
        return f"its activation {found.site.name} {fixed[found.site.name]}"
    return found


def activation_at(parent: nn.Module, node: Node) -> Match | None:
    """The activation that node applies, or None."""
    name, site = None, Site("call", "")
    if node.op == "call_module":
        name, site = module_activation(parent.get_submodule(str(node.target))), Site("module", str(node.target))
    elif node.op == "call_function" and isinstance(node.target, Held):
        name, site = node.target.activation, Site("held", node.target.attribute)
        name = name if len(node.args) == 1 and not node.kwargs else None
    elif node.op == "call_function":
        name = function_activation(node.target, node.args, node.kwargs)
    elif node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
        name = METHODS.get(str(node.target))
    return None if name is None else Match(name, site)


def _stray_uses(graphs: list[Graph], verdicts: dict[str, Verdict]) -> dict[str, str]:
    """Linears to give up because their activation is also applied to something else: {linear: reason}."""
    stray: set[Site] = set()
    for graph in graphs:
        for node in graph.nodes:
            site = _shared_site(node)
            if site is None:
                continue
            source = node.args[0] if node.args else None
            called = isinstance(source, Node) and source.op == "call_module"
            verdict = verdicts.get(str(source.target)) if called else None  # type: ignore[union-attr]
            if not (isinstance(verdict, Match) and verdict.site == site):
                stray.add(site)
    return {
        linear: f"its activation {verdict.site.name} is also applied to something else"
        for linear, verdict in verdicts.items()
        if isinstance(verdict, Match) and verdict.site in stray
    }


def _shared_site(node: Node) -> Site | None:
    if node.op == "call_module":
        return Site("module", str(node.target))
    if node.op == "call_function" and isinstance(node.target, Held):
        return Site("held", node.target.attribute)
    return None


def _describe(parent: nn.Module, node: Node) -> str:
    if node.op == "call_module":
        return type(parent.get_submodule(str(node.target))).__name__
    if node.op == "output":
        return f"the return of {type(parent).__name__}"
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
