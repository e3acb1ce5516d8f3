"""Where a function's source has the form of something fused: act(linear(x)), act(gate(x)) * up(x), linear(act(linear(x))).

Only the form is looked at here, so a Site is a possibility: what the names in it stand for is for `resolve` to say, module by
module. The same source gives the same sites in the same order, each with a key.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional, Union

from .activations import METHODS
from .flow import Definition, Flow, is_harmless, is_pure, loaded, stored

FORMS = ("mlp", "gated_linear", "linear")
"""The ops that expressions become, larger ones first: what one takes, no other can."""
PARTS = frozenset(("mlp", "linear"))
"""Those of them that neighbours in a list of modules may become."""
MOST_BETWEEN = 4  # the steps between the two halves of an MLP: an activation dropout and an Identity are two


@dataclass(frozen=True)
class Applied:
    """called(inner, *args, **keywords), or inner.called(...): called is an expression, or a method's name."""

    called: Union[ast.expr, str]
    inner: ast.expr
    args: tuple[ast.expr, ...]
    keywords: tuple[ast.keyword, ...]


@dataclass(frozen=True)
class Site:
    """One expression, perhaps over several statements, that one fused call could replace.

    root: the expression, or the `v *= x` statement, that the call replaces. linears: the expressions called as Linears, in
    the order in which the fused function takes them. inputs: what they are called with. steps: what stands between the
    halves of an MLP. captured: the assignments whose values the call takes over. called: of a single function, its name.
    factors: of a gate, the gate's and the other; up_after: after how many of the gate's two calls the other is computed.
    """

    key: str
    op: str
    root: Union[ast.expr, ast.stmt]
    linears: tuple[ast.expr, ...] = ()
    inputs: tuple[ast.expr, ...] = ()
    activation: Optional[Applied] = None
    steps: tuple[Applied, ...] = ()
    captured: tuple[Definition, ...] = ()
    nodes: frozenset[int] = frozenset()
    called: Optional[ast.expr] = None
    factors: tuple[ast.expr, ...] = ()
    up_after: int = 0


@dataclass
class Pieces:
    """What was looked through on the way into an expression: its nodes, and the assignments between them."""

    nodes: list[int] = field(default_factory=list)
    captured: list[Definition] = field(default_factory=list)

    def look_through(self, flow: Flow, expression: ast.expr) -> ast.expr:
        """expression, or the value of the variable it is where nothing else reads that."""
        found = flow.definition(expression)
        if found is None:
            return expression
        self.captured.append(found)
        return found.value


def sites(flow: Flow) -> list[Site]:
    """All the sites of a function, those inside others after them."""
    found: list[Site] = []
    for place, node in enumerate(ast.walk(flow.tree)):
        for site in _at(flow, node, place):
            if _nothing_between(flow, site):
                found.append(site)
    return found


def _at(flow: Flow, node: ast.AST, place: int) -> Iterator[Site]:
    if isinstance(node, ast.Call):
        yield from _function(node, place)
        yield from _activated(flow, node, place)
        yield from _mlps(flow, node, place)
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.Call)):
        yield from _gated(flow, node, place)
    if isinstance(node, ast.For):
        yield from _chain(flow, node, place)


def _function(node: ast.Call, place: int) -> Iterator[Site]:
    if isinstance(node.func, ast.Attribute) and node.func.attr == "softmax":
        yield Site(f"method@{place}", "softmax_method", node, called=node.func, nodes=frozenset([id(node)]))
    if node.args and not isinstance(node.args[0], ast.Starred) and is_called(node.func):
        yield Site(f"function@{place}", "function", node, called=node.func, nodes=frozenset([id(node)]))


def _chain(flow: Flow, node: ast.For, place: int) -> Iterator[Site]:
    """`for module in modules: x = module(x)`, where nothing else reads the loop's variable."""
    statement = node.body[0]
    if len(node.body) != 1 or node.orelse or not isinstance(node.target, ast.Name) or not isinstance(statement, ast.Assign):
        return
    (target, *others), call = statement.targets, statement.value
    if others or not isinstance(target, ast.Name) or not is_linear_call(call) or not is_path(node.iter):
        return
    assert isinstance(call, ast.Call)
    names = [n.id if isinstance(n, ast.Name) else None for n in (call.func, call.args[0])]
    uses = sum(isinstance(n, ast.Name) and n.id == node.target.id for n in ast.walk(flow.tree))
    if names != [node.target.id, target.id] or uses != 2 or target.id == node.target.id:
        return
    if flow.shared.isdisjoint((target.id, node.target.id)) and not flow.seen_after_exception(frozenset([target.id]), node):
        yield Site(f"chain@{place}", "chain", node, inputs=(node.iter,), nodes=frozenset([id(call)]))


def _activated(flow: Flow, node: ast.Call, place: int) -> Iterator[Site]:
    pieces = Pieces()
    found = _product_in(flow, node, pieces)
    if found is not None:
        applied, linear = found
        yield _site("linear", place, node, pieces, (linear,), applied)


def _product_in(flow: Flow, node: ast.expr, pieces: Pieces) -> tuple[Applied, ast.Call] | None:
    """node as (an activation applied, the call of a Linear inside)."""
    applied = applied_at(node)
    if applied is None:
        return None
    pieces.nodes.append(id(node))
    linear = pieces.look_through(flow, applied.inner)
    if not is_linear_call(linear):
        return None
    assert isinstance(linear, ast.Call)
    pieces.nodes.append(id(linear))
    return applied, linear


def _gated(flow: Flow, node: ast.BinOp | ast.AugAssign | ast.Call, place: int) -> Iterator[Site]:
    factors = _factors(node)
    for order in (factors, factors[::-1]):
        if len(order) != 2:
            continue
        pieces = Pieces([id(node)])
        gate, up = (pieces.look_through(flow, factor) for factor in order)
        found = _product_in(flow, gate, pieces)
        if found is None or not is_linear_call(up):
            continue
        assert isinstance(up, ast.Call)
        if not all(isinstance(call.args[0], ast.Name) for call in (up, found[1])):  # what a call may change is read later
            continue
        pieces.nodes.append(id(up))
        up_after = sum(_before(flow, call, up, order is factors) for call in (found[1], gate))
        name = "gated_linear" if order is factors else "gated_linear_reversed"
        yield _site(name, place, node, pieces, (found[1], up), found[0], factors=tuple(order), up_after=up_after)


def _before(flow: Flow, one: ast.expr, other: ast.expr, is_left: bool) -> bool:
    """Whether one is computed before the other. is_left: whether one is in the left factor."""
    lines = [flow.statement(call) for call in (one, other)]
    if lines[0] is lines[1] or None in lines:
        return is_left
    block = [flow.block[id(line)][1] for line in lines if line is not None]
    return block[0] < block[1]


def _mlps(flow: Flow, node: ast.Call, place: int) -> Iterator[Site]:
    if not is_linear_call(node):
        return
    pieces = Pieces([id(node)])
    steps: list[Applied] = []
    inner = pieces.look_through(flow, node.args[0])
    for between in range(MOST_BETWEEN + 1):
        here = Pieces(list(pieces.nodes), list(pieces.captured))
        found = _product_in(flow, inner, here)
        if found is not None:
            yield _site(f"mlp{between}", place, node, here, (found[1], node), found[0], steps=tuple(reversed(steps)))
        step = applied_at(inner)
        if step is None:
            return
        pieces.nodes.append(id(inner))
        steps.append(step)
        inner = pieces.look_through(flow, step.inner)


def _site(
    name: str, place: int, root: ast.expr | ast.stmt, pieces: Pieces, linears: tuple[ast.Call, ...], activation: Applied,
    steps: tuple[Applied, ...] = (), factors: tuple[ast.expr, ...] = (), up_after: int = 0,
) -> Site:  # fmt: skip
    inputs = tuple(call.args[0] for call in (linears[:1] if name.startswith("mlp") else linears))
    op = "mlp" if name.startswith("mlp") else name.removesuffix("_reversed")
    return Site(
        f"{name}@{place}", op, root, tuple(call.func for call in linears), inputs, activation, steps,
        tuple(pieces.captured), frozenset(pieces.nodes), None, factors, up_after,
    )  # fmt: skip


def _nothing_between(flow: Flow, site: Site) -> bool:
    """Whether the site's statements follow each other with nothing of account between, and may be computed at the last."""
    if not site.captured:
        return True
    own = {id(definition.statement) for definition in site.captured}
    between = {id(s): s for definition in site.captured for s in definition.between}
    if not set(between) <= own or any(
        isinstance(s, ast.Assign) and len(s.targets) > 1 for d in site.captured for s in [d.statement]
    ):
        return False
    steps = [*site.steps, *([site.activation] if site.activation else [])]
    read: set[str] = set()
    for part in (
        *site.linears,
        *(s.called for s in steps),
        *(a for s in steps for a in s.args),
        *(k.value for s in steps for k in s.keywords),
    ):
        read |= loaded(part) if isinstance(part, ast.AST) else set()
    first = min(flow.block[id(definition.statement)][1] for definition in site.captured)
    block, _ = flow.block[id(site.captured[0].statement)]
    last = flow.statement(site.root) if isinstance(site.root, ast.expr) else site.root
    if last is None or not (last is site.root or flow.is_first(site.root)):
        return False
    middle = block[first : flow.block[id(last)][1]]
    written = stored(middle)
    if not all(id(s) in own or is_harmless(s) for s in middle) or not written.isdisjoint(read | flow.shared):
        return False
    return not flow.seen_after_exception(written, last)


def applied_at(node: ast.expr) -> Applied | None:
    """node as something called with one tensor: f(x, constants...), or x.f(), of which x may be anything."""
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        return None
    if not node.args and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.keywords:
        return Applied(node.func.attr, node.func.value, (), ())
    if not node.args or any(isinstance(arg, ast.Starred) for arg in node.args) or not is_called(node.func):
        return None
    if not all(map(is_pure, (*node.args[1:], *(keyword.value for keyword in node.keywords)))):
        return None
    return Applied(node.func, node.args[0], tuple(node.args[1:]), tuple(node.keywords))


def is_linear_call(node: ast.expr) -> bool:
    """Whether node may be the call of a Linear: something named, called with one argument."""
    return isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords and is_path(node.func) and not isinstance(
        node.args[0], ast.Starred
    )  # fmt: skip


def is_called(node: ast.expr) -> bool:
    """Whether node may be called: a path, or a module made on the spot, such as nn.Softmax(dim=-1)."""
    if isinstance(node, ast.Call) and is_path(node.func):
        return all(map(is_pure, (*node.args, *(keyword.value for keyword in node.keywords))))
    return is_path(node)


def is_path(node: ast.expr) -> bool:
    """Whether node is names, attributes and subscripts only, such as self.layers[0].fc1: reading it later reads the same."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Subscript) and not is_pure(node.slice):
            return False
        node = node.value
    return isinstance(node, ast.Name)


def _factors(node: ast.BinOp | ast.AugAssign | ast.Call) -> list[ast.expr]:
    """The two factors of a product elementwise: a * b, a *= b, torch.mul(a, b), a.mul(b)."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right] if isinstance(node.op, ast.Mult) else []
    if isinstance(node, ast.AugAssign):
        use = node.target
        return [use, node.value] if isinstance(node.op, ast.Mult) and isinstance(use, ast.Name) else []
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("mul", "multiply") or node.keywords:
        return []
    if len(node.args) == 2 and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
        return list(node.args)
    return [node.func.value, node.args[0]] if len(node.args) == 1 else []
