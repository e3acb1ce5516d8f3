"""Where a source can be changed by fixed operators: a comparison, a constant, a mask or a condition, a stride, a statement.

What changes nothing that a caller could see is left out: docstrings, messages, annotations, decorators, and of kernels what only
says how fast they are (stages, warps, eviction policies).
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .mutant import offset

OPERATORS = ("comparison", "constant", "mask", "stride", "statement")
# Each comparison becomes the one that differs where its two sides are equal, or its contrary where that is all it asks.
_CONTRARY: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_SAYING = frozenset(
    (
        "warn",
        "warn_once",
        "refuse",
        "debug",
        "info",
        "warning",
        "error",
        "static_assert",
        "print",
        "echo",
        "note_refusal",
        "name_launch",
    )
)
_SPEED = frozenset(("eviction_policy", "num_stages", "num_warps", "warp_specialize", "maxsize"))
_SPEAKING = frozenset(
    ("_said", "spelled", "described", "_spelled", "__str__", "__repr__", "_one_line")
)  # functions of words only
_LEAVING = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_Functions = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Site:
    """One change that is possible: what stands in source[start:end], in which function, becomes `new`."""

    operator: str
    function: str
    start: int
    end: int
    old: str
    written: Callable[[], str]
    name: str  # the same for as long as the function has this text at this place

    @property
    def new(self) -> str:
        return self.written()


def sites(source: str, path: str, kernels: bool) -> Iterator[Site]:
    """Every site of a file, those of one function together. kernels: only in functions that Triton compiles."""
    for qualified, function in _functions(ast.parse(source), ""):
        jitted = any("jit" in ast.unparse(d) for d in function.decorator_list)
        if (kernels and not jitted) or function.name in _SPEAKING:
            continue
        seen: dict[str, int] = {}
        for operator, node, new in _changes(function, jitted):
            start = offset(source, node.lineno, node.col_offset)
            end = offset(source, node.end_lineno or 0, node.end_col_offset or 0)
            text = f"{path}:{qualified}:{operator}:{' '.join(source[start:end].split())}"
            seen[text] = seen.get(text, 0) + 1
            name = hashlib.sha256(f"{text}:{seen[text]}".encode()).hexdigest()[:6]
            yield Site(operator, qualified, start, end, source[start:end], new, name)


def _functions(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*_Functions, ast.ClassDef)):
            name = f"{inside}.{child.name}" if inside else child.name
            if isinstance(child, _Functions):
                yield name, child
            yield from _functions(child, name)
        elif not isinstance(child, ast.expr):
            yield from _functions(child, inside)


def _changes(
    function: ast.FunctionDef | ast.AsyncFunctionDef, jitted: bool
) -> Iterator[tuple[str, ast.expr | ast.stmt, Callable[[], str]]]:
    """(operator, what it changes, a function that writes what it becomes)."""
    strides = sorted({a.arg for a in function.args.args if a.arg.startswith("stride")})
    droppable = {id(statement) for statement in _droppable(function.body, {a.arg for a in function.args.args})}
    for node in _of_account(function.body):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _CONTRARY:
            yield "comparison", node, functools.partial(_compared, node)
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield "constant", node, functools.partial(_another, node.value)
        elif isinstance(node, ast.BoolOp):
            for i in range(len(node.values)):
                yield "mask", node, functools.partial(_without_operand, node, i)
        elif jitted and isinstance(node, ast.Call) and _is_masked(node):
            yield "mask", node, functools.partial(_without_mask, node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd) and jitted:
            for side in (node.left, node.right):
                yield "mask", node, functools.partial(_in_brackets, side)
        elif isinstance(node, ast.Name) and node.id in strides and len(strides) > 1:
            alike = [s for s in strides if s[:-1] == node.id[:-1]]
            among = alike if len(alike) > 1 else strides
            yield "stride", node, functools.partial(str, among[(among.index(node.id) + 1) % len(among)])
        elif id(node) in droppable and isinstance(node, ast.stmt):
            yield "statement", node, functools.partial(str, "pass")


def _compared(node: ast.Compare) -> str:
    changed = copy.copy(node)
    changed.ops = [_CONTRARY[type(node.ops[0])]()]
    return ast.unparse(changed)


def _another(value: float) -> str:
    return repr(not value if isinstance(value, bool) else value + 1)


def _without_operand(node: ast.BoolOp, place: int) -> str:
    rest = copy.copy(node)
    rest.values = [value for i, value in enumerate(node.values) if i != place]
    return _in_brackets(rest if len(rest.values) > 1 else rest.values[0])


def _in_brackets(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"


def _is_masked(call: ast.Call) -> bool:
    is_access = isinstance(call.func, ast.Attribute) and call.func.attr in ("load", "store")
    return is_access and any(k.arg == "mask" for k in call.keywords)


def _without_mask(call: ast.Call) -> str:
    """A load or a store that reads or writes whatever its pointers point at."""
    changed = copy.copy(call)
    changed.keywords = [k for k in call.keywords if k.arg not in ("mask", "other")]
    return ast.unparse(changed)


def _droppable(block: list[ast.stmt], before: set[str]) -> Iterator[ast.stmt]:
    """The statements without which the function still runs: what they assign has a value then, from before."""
    assigned = set(before)
    for statement in block:
        if isinstance(statement, ast.Assign):
            names = {
                n.id for t in statement.targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            if names and names <= assigned and not any(isinstance(n, ast.JoinedStr) for n in ast.walk(statement.value)):
                yield statement
            assigned |= names
        elif isinstance(statement, ast.AugAssign) or (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        ):
            yield statement
        elif isinstance(statement, ast.If) and not statement.orelse and isinstance(statement.body[-1], _LEAVING):
            yield statement  # a way out, not a branch
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list) and not isinstance(statement, (*_Functions, ast.ClassDef)):
                target = (
                    {statement.target.id}
                    if isinstance(statement, ast.For) and isinstance(statement.target, ast.Name)
                    else set()
                )
                yield from _droppable(inner, assigned | target)


def _of_account(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes, in the order of the text, without what only says something, and without functions inside."""
    for node in nodes:
        if isinstance(node, (*_Functions, ast.ClassDef, ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)):
            continue
        if isinstance(node, ast.Call) and _called(node) in _SAYING:
            continue
        if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or _says(node.value)):
            continue
        if isinstance(node, ast.keyword) and node.arg in _SPEED:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        if isinstance(node, ast.AnnAssign):
            yield from _of_account([node.value] if node.value else [])
        else:
            yield from _of_account(ast.iter_child_nodes(node))


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _says(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and _called(value) in _SAYING
