"""Data flow inside one function: which assignment a variable's use reads, where no other use reads it.

Two statements `h = self.fc1(x)` and `h = self.act(h)` are one expression, `self.act(self.fc1(x))`, if nothing else reads the
first h and nothing of account happens between them. Whatever is not certain is answered with no.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Union

_SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)
_SIZES = frozenset(("size", "dim", "numel", "element_size"))
_FRAMES = frozenset(("locals", "exec", "eval", "vars"))


@dataclass(frozen=True)
class Definition:
    """`name = value`, read by `use` only; between: the statements from there to the use that are not harmless."""

    use: ast.Name
    statement: ast.Assign
    between: tuple[ast.stmt, ...]

    @property
    def value(self) -> ast.expr:
        return self.statement.value


class Flow:
    """Where the nodes of one function stand, and what its variables hold."""

    def __init__(self, tree: ast.FunctionDef) -> None:
        self.tree = tree
        self.parent: dict[int, ast.AST] = {}
        self.block: dict[int, tuple[list[ast.stmt], int]] = {}
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parent[id(child)] = node
            for block in _blocks(node):
                self.block.update((id(statement), (block, i)) for i, statement in enumerate(block))
        self._shared = self._variables_seen_elsewhere()

    def definition(self, use: ast.expr) -> Definition | None:
        """The assignment that use, a variable, reads, where nothing else reads it and both stand in one block."""
        if not isinstance(use, ast.Name) or use.id in self._shared:
            return None
        statement = self.statement(use)
        augmented = isinstance(statement, ast.AugAssign) and statement.target is use  # `h *= x` reads h, and replaces it
        if statement is None or sum(_is_load(node, use.id) for node in ast.walk(statement)) != (0 if augmented else 1):
            return None
        block, place = self.block[id(statement)]
        between: list[ast.stmt] = []
        for before in reversed(block[:place]):
            if _assigns(before, use.id) and isinstance(before, ast.Assign):
                alive = not augmented and self._alive_after(use.id, statement)
                return None if alive else Definition(use, before, tuple(between))
            if any(isinstance(node, ast.Name) and node.id == use.id for node in ast.walk(before)):
                return None
            if not is_harmless(before):
                if not isinstance(before, ast.Assign):
                    return None
                between.append(before)
        return None

    def last_value(self, use: ast.expr) -> ast.expr:
        """use, or the value that the variable it is was given last in its block: for reports, which may err on a branch."""
        statement: ast.AST = use
        while not isinstance(statement, ast.stmt):
            statement = self.parent[id(statement)]
        while isinstance(use, ast.Name) and statement is not self.tree:
            block, place = self.block[id(statement)]
            assigned = [s for s in block[:place] if isinstance(s, ast.Assign) and use.id in stored(s.targets)]
            if assigned:
                return assigned[-1].value
            statement = self.parent[id(statement)]
            while not isinstance(statement, ast.stmt):
                statement = self.parent[id(statement)]
        return use

    def statement(self, node: ast.expr) -> ast.stmt | None:
        """The simple statement that evaluates node exactly once whenever it runs, or None."""
        child: ast.AST = node
        while not isinstance(parent := self.parent[id(child)], ast.stmt):
            first_of = (
                parent.values[0] if isinstance(parent, ast.BoolOp) else parent.test if isinstance(parent, ast.IfExp) else child
            )
            if isinstance(parent, _SCOPES) or child is not first_of:
                return None
            child = parent
        return parent if isinstance(parent, _SIMPLE) else None

    def in_own_scope(self, node: ast.AST) -> bool:
        """Whether node belongs to the function itself, not to a lambda, comprehension or function inside it."""
        while node is not self.tree:
            node = self.parent[id(node)]
            if isinstance(node, _SCOPES) and node is not self.tree:
                return False
        return True

    def _variables_seen_elsewhere(self) -> frozenset[str]:
        """Variables that nested functions see, that are global, that are deleted, or all of them where frames are looked into."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                names.update(node.names)
            elif isinstance(node, _SCOPES) and node is not self.tree:
                names.update(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))
            elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Del) or node.id in _FRAMES):
                names.update([node.id] if node.id not in _FRAMES else _names(self.tree))
        return frozenset(names)

    def _alive_after(self, name: str, statement: ast.stmt) -> bool:
        """Whether anything may read the variable's present value after the statement."""
        if _assigns(statement, name):
            return False
        current: ast.AST = statement
        while current is not self.tree:
            block, place = self.block[id(current)]
            outcome = _first(block[place + 1 :], name)
            if outcome is not None:
                return outcome
            parent = self.parent[id(current)]
            if isinstance(parent, (ast.For, ast.AsyncFor, ast.While)):
                head = parent.test if isinstance(parent, ast.While) else parent.iter
                if _loads(head, name) or _first(parent.body, name) or any(_loads(node, name) for node in parent.orelse):
                    return True
            elif isinstance(parent, ast.Try) and any(
                _loads(node, name) for node in (*parent.handlers, *parent.orelse, *parent.finalbody)
            ):
                return True
            current = parent
            if not isinstance(current, ast.stmt):  # a handler or a case: its statement
                current = self.parent[id(current)]
        return False


def is_harmless(statement: ast.stmt) -> bool:
    """Whether a statement reads and computes only: no call but for sizes, no write but to variables."""
    if isinstance(statement, ast.Pass):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if not isinstance(statement, ast.Assign) or not all(_is_variable(target) for target in statement.targets):
        return False
    return is_pure(statement.value)


def is_pure(expression: ast.expr) -> bool:
    """Whether evaluating an expression changes nothing and it may be evaluated a little later."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Attribute) and node.func.attr in _SIZES):
                return False
        elif isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, *_SCOPES)):
            return False
    return True


def stored(statements: Iterable[ast.AST]) -> frozenset[str]:
    """The variables that the statements write."""
    nodes = (node for statement in statements for node in ast.walk(statement))
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load))


def loaded(node: ast.AST) -> frozenset[str]:
    """The variables that node reads."""
    return frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))


def _first(statements: list[ast.stmt], name: str) -> Union[bool, None]:
    """What the statements do first with a variable: True, read it; False, replace it or leave; None, neither."""
    for statement in statements:
        if isinstance(statement, ast.If):
            if _loads(statement.test, name):
                return True
            outcomes = (_first(statement.body, name), _first(statement.orelse, name))
            if True in outcomes:
                return True
            if outcomes == (False, False):
                return False
        elif _loads(statement, name) or isinstance(statement, (ast.Break, ast.Continue)):
            return True
        elif isinstance(statement, (ast.Return, ast.Raise)) or _assigns(statement, name):
            return False
    return None


def _assigns(statement: ast.AST, name: str) -> bool:
    """Whether a statement replaces a variable and does it always."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _is_variable(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) or (isinstance(target, ast.Tuple) and all(map(_is_variable, target.elts)))


def _is_load(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def _loads(node: ast.AST, name: str) -> bool:
    """Whether node reads the variable; an augmented assignment does."""
    for inner in ast.walk(node):
        if _is_load(inner, name):
            return True
        if isinstance(inner, ast.AugAssign) and isinstance(inner.target, ast.Name) and inner.target.id == name:
            return True
    return False


def _names(tree: ast.AST) -> frozenset[str]:
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list):
            yield block
