"""Which branches of a method a module takes as it is configured now: for the report's counts only, which may err."""

from __future__ import annotations

import ast
from typing import Any

from .flow import Flow
from .resolve import Scope

_UNKNOWN = object()
_CONSTANTS = (bool, int, float, str, type(None))


def is_taken(flow: Flow, scope: Scope, node: ast.AST) -> bool:
    """Whether node is in no branch that the module's own constants rule out."""
    while node is not flow.tree:
        parent = flow.parent[id(node)]
        block, place = flow.block.get(id(node), ([], 0))
        if any(_leaves(before, scope) for before in block[:place]):
            return False
        if isinstance(parent, (ast.If, ast.IfExp)) and node is not parent.test:
            value = _value(parent.test, scope)
            body = parent.body if isinstance(parent.body, list) else [parent.body]
            if value is not _UNKNOWN and bool(value) is not any(node is part for part in body):
                return False
        node = parent
    return True


def _leaves(statement: ast.stmt, scope: Scope) -> bool:
    """Whether an `if` is known to take a branch that returns or raises."""
    value = _value(statement.test, scope) if isinstance(statement, ast.If) else _UNKNOWN
    if value is _UNKNOWN or not isinstance(statement, ast.If):
        return False
    branch = statement.body if value else statement.orelse
    return bool(branch) and isinstance(branch[-1], (ast.Return, ast.Raise))


def named_in_taken_branches(flow: Flow, scope: Scope) -> frozenset[str]:
    """The attributes and globals that a method names where it is not ruled out."""
    found: set[str] = set()
    for node in ast.walk(flow.tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name not in found and is_taken(flow, scope, node):
                found.add(name)
    return frozenset(found)


def _value(test: ast.expr, scope: Scope) -> Any:
    """What a condition is, where constants of the module tell it; else _UNKNOWN."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, scope)
        return value if value is _UNKNOWN else not value
    if isinstance(test, ast.BoolOp):
        values = [_value(part, scope) for part in test.values]
        deciding = [v for v in values if v is not _UNKNOWN and bool(v) is isinstance(test.op, ast.Or)]
        return deciding[0] if deciding else _UNKNOWN if _UNKNOWN in values else values[-1]
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, right = _value(test.left, scope), _value(test.comparators[0], scope)
        if left is _UNKNOWN or right is _UNKNOWN:
            return _UNKNOWN
        op = test.ops[0]
        if isinstance(op, (ast.Is, ast.Eq)):
            return left == right
        return left != right if isinstance(op, (ast.IsNot, ast.NotEq)) else _UNKNOWN
    found = scope.objects(test)
    if len(found) != 1:
        return _UNKNOWN
    return found[0] if isinstance(found[0], _CONSTANTS) else _UNKNOWN if not hasattr(found[0], "_modules") else True
