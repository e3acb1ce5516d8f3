"""Data flow inside one function: which assignment a variable's use reads, where no other use reads it.

Two statements `h = self.fc1(x)` and `h = self.act(h)` are one expression, `self.act(self.fc1(x))`, if nothing else reads the
first h and nothing of account happens between them. Whatever is not certain is answered with no.
"""

from __future__ import annotations

import ast
import sys
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
_FRAMES = frozenset(("currentframe", "_getframe", "f_locals"))  # as names and as attributes
_LOCALS = frozenset(("locals", "exec", "eval", "vars", "dir")) | _FRAMES  # as names
_PASSING = frozenset(("no_grad", "enable_grad", "inference_mode", "set_grad_enabled", "autocast", "record_function"))
_TRIES = (ast.Try, ast.TryStar) if sys.version_info >= (3, 11) else (ast.Try,)
_CATCHING = (*_TRIES, ast.With, ast.AsyncWith)


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
        self._named: dict[int, frozenset[str]] = {}
        self.shared = self._variables_seen_elsewhere()

    def definition(self, use: ast.expr) -> Definition | None:
        """The assignment that use, a variable, reads, where nothing else reads it and both stand in one block."""
        if not isinstance(use, ast.Name) or use.id in self.shared:
            return None
        statement = self.statement(use)
        augmented = isinstance(statement, ast.AugAssign) and statement.target is use  # `h *= x` reads h, and replaces it
        if statement is None or sum(_reads(node, use.id) for node in ast.walk(statement)) != 1:
            return None
        if any(isinstance(node, ast.NamedExpr) and node.target.id == use.id for node in ast.walk(statement)):
            return None
        block, place = self.block[id(statement)]
        between: list[ast.stmt] = []
        for before in reversed(block[:place]):
            if _assigns(before, use.id) and isinstance(before, ast.Assign):
                alive = not augmented and self._alive_after(use.id, statement)
                return None if alive else Definition(use, before, tuple(between))
            if use.id in self._named_in(before):
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
            if isinstance(parent, _SCOPES) or any(child is part for part in _conditional(parent)):
                return None
            child = parent
        return parent if isinstance(parent, _SIMPLE) else None

    def is_first(self, node: ast.AST) -> bool:
        """Whether nothing that its statement evaluates before node tells whether an earlier call was made by then."""
        while not isinstance(node, ast.stmt):
            parent = self.parent[id(node)]
            if isinstance(parent, ast.Assign) and node is parent.value:
                return True
            in_order = not isinstance(parent, (ast.Assign, ast.AnnAssign, ast.Dict))
            for child in ast.iter_child_nodes(parent):
                if child is node and in_order:
                    break
                value = child.value if isinstance(child, ast.keyword) else child
                if child is not node and isinstance(value, ast.expr) and not _is_fixed(value):
                    return False
            node = parent
        return True

    def seen_after_exception(self, names: frozenset[str], statement: ast.stmt) -> bool:
        """Whether an exception that the statement raises may leave somebody in the function to read one of the variables.

        The answer is for all statements of its block up to it: what is caught, or passes a `finally` or a `with`.
        """
        allowed: set[int] = set()
        current: ast.AST = statement
        while current is not self.tree:
            if id(current) in self.block:
                block, place = self.block[id(current)]
                allowed.update(id(node) for later in block[place:] for node in ast.walk(later))
            current = self.parent[id(current)]
            if isinstance(current, _CATCHING) and not _only_passes(current):
                every = (node for node in ast.walk(self.tree) if any(_reads(node, name) for name in names))
                return any(id(node) not in allowed for node in every)
        return False

    def _named_in(self, statement: ast.stmt) -> frozenset[str]:
        """The variables that a statement names."""
        if id(statement) not in self._named:
            self._named[id(statement)] = _names(statement)
        return self._named[id(statement)]

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
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
                names.add(node.id)
        return frozenset(_names(self.tree) if self.looks_into_frames else names)

    @property
    def looks_into_frames(self) -> bool:
        """Whether the function may read its own variables by other means than their names, as locals() does."""
        return any(
            (isinstance(node, ast.Name) and node.id in _LOCALS) or (isinstance(node, ast.Attribute) and node.attr in _FRAMES)
            for node in ast.walk(self.tree)
        )

    @property
    def asks_own_class(self) -> bool:
        """Whether a method asks for the class of its module, which fuse changes, for more than its name."""
        arguments = (*self.tree.args.posonlyargs, *self.tree.args.args)
        for node in ast.walk(self.tree):
            owner = node.value if isinstance(node, ast.Attribute) and node.attr == "__class__" else None
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "type"
                and len(node.args) == 1
            ):
                owner = node.args[0]
            if isinstance(owner, ast.Name) and arguments and owner.id == arguments[0].arg:
                parent = self.parent[id(node)]
                if not (isinstance(parent, ast.Attribute) and parent.attr in ("__name__", "__qualname__", "__module__")):
                    return True
        return False

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
            elif isinstance(parent, _TRIES) and any(
                _loads(node, name) for node in (*parent.handlers, *parent.orelse, *parent.finalbody)
            ):
                return True
            current = parent
            if not isinstance(current, ast.stmt):  # a handler or a case: its statement
                current = self.parent[id(current)]
        return False


def is_harmless(statement: ast.stmt) -> bool:
    """Whether a statement does the same before and after a call of any module: it names values anew, or computes sizes."""
    if isinstance(statement, ast.Pass):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if not isinstance(statement, ast.Assign) or not all(_is_variable(target) for target in statement.targets):
        return False
    return _is_fixed(statement.value)


def _is_fixed(expression: ast.expr) -> bool:
    """Whether an expression gives the same before and after a call of any module, even of one that changes its input."""
    if isinstance(expression, (ast.Tuple, ast.List)):
        return all(map(_is_fixed, expression.elts))
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return isinstance(expression, ast.Name) or _is_size(expression)


def _is_size(expression: ast.expr) -> bool:
    """Whether an expression is made of constants and of tensors' sizes only."""
    if isinstance(expression, ast.BinOp):
        return _is_size(expression.left) and _is_size(expression.right)
    if isinstance(expression, ast.UnaryOp):
        return _is_size(expression.operand)
    if isinstance(expression, ast.Subscript):
        return _is_size(expression.value) and is_pure(expression.slice)
    if isinstance(expression, ast.Call):
        return is_pure(expression) and isinstance(expression.func, ast.Attribute) and _is_fixed(expression.func.value)
    if isinstance(expression, ast.Attribute):
        return expression.attr in ("shape", "ndim") and _is_fixed(expression.value)
    return isinstance(expression, ast.Constant)


def is_pure(expression: ast.expr) -> bool:
    """Whether evaluating an expression changes nothing and it may be evaluated a little later."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Attribute) and node.func.attr in _SIZES):
                return False
        elif isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Starred, *_SCOPES)):
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
        elif _loads(statement, name) or any(isinstance(node, (ast.Break, ast.Continue)) for node in ast.walk(statement)):
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


def _reads(node: ast.AST, name: str) -> bool:
    """Whether node itself is a read of the variable; an augmented assignment is."""
    target = node.target if isinstance(node, ast.AugAssign) else None
    return _is_load(node, name) or (isinstance(target, ast.Name) and target.id == name)


def _loads(node: ast.AST, name: str) -> bool:
    """Whether node, or anything in it, reads the variable."""
    return any(_reads(inner, name) for inner in ast.walk(node))


def _conditional(node: ast.AST) -> list[ast.expr]:
    """The parts of an expression that are evaluated only under a condition."""
    if isinstance(node, ast.BoolOp):
        return node.values[1:]
    if isinstance(node, ast.Compare):
        return node.comparators[1:]
    return [node.body, node.orelse] if isinstance(node, ast.IfExp) else []


def _only_passes(node: ast.AST) -> bool:
    """Whether node is a `with` of torch's, which lets every exception pass."""
    if not isinstance(node, ast.With):
        return False
    calls = [item.context_expr for item in node.items]
    named = [getattr(call.func, "attr", None) or getattr(call.func, "id", "") for call in calls if isinstance(call, ast.Call)]
    return len(named) == len(calls) and _PASSING.issuperset(named)


def _names(tree: ast.AST) -> frozenset[str]:
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list):
            yield block
