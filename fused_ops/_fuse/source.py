"""A function's source as a syntax tree that is known to be what runs, and a changed tree made a function again.

The tree is compiled and compared with the function's own bytecode. So a file edited since its import, a function that another
tool has rewritten, or one made by exec under another's name is never taken for what it is not.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

_FUTURE = functools.reduce(lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0)
_COMPARED = (
    "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_posonlyargcount",
    "co_kwonlyargcount",
)  # fmt: skip


class SourceError(Exception):
    """A function's source cannot be had, or is not what runs. The message completes "<function> ..."."""


@dataclass(frozen=True)
class Source:
    """function: undecorated. tree: its definition, which must not be changed: `parse` gives a fresh one."""

    function: FunctionType
    tree: ast.FunctionDef

    @property
    def self_name(self) -> str | None:
        """The name of the first argument, a method's module."""
        arguments = (*self.tree.args.posonlyargs, *self.tree.args.args)
        return arguments[0].arg if arguments else None


def undecorated(function: Any) -> FunctionType:
    """The function that decorators made with functools.wraps stand around, or SourceError."""
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        if not isinstance(function, FunctionType) or len(_cells_of(function, wrapped)) != 1:
            raise SourceError("is decorated in a way that fuse cannot look through")
        function = wrapped
    if not isinstance(function, FunctionType):
        raise SourceError(f"is no Python function but a {type(function).__name__}")
    return function


def redecorated(decorated: Any, inner: FunctionType) -> Any:
    """decorated, with inner in the place of the function it stands around."""
    if not hasattr(decorated, "__wrapped__"):
        return inner
    (place,) = _cells_of(decorated, decorated.__wrapped__)
    cells = list(decorated.__closure__)
    cells[place] = CellType(redecorated(decorated.__wrapped__, inner))
    made = _function(decorated, decorated.__code__, tuple(cells))
    made.__wrapped__ = cells[place].cell_contents  # type: ignore[attr-defined]
    return made


def _cells_of(function: FunctionType, value: Any) -> list[int]:
    """Where the function's closure holds value."""
    return [place for place, cell in enumerate(function.__closure__ or ()) if _content(cell) is value]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty: its variable has no value yet
        return None


def read(function: Any) -> Source:
    """The source of a function or method as defined in a file, or SourceError."""
    inner = undecorated(function)
    return Source(inner, parse(inner))


def parse(function: FunctionType) -> ast.FunctionDef:
    """A fresh tree of the function's definition, its lines numbered as in its file, or SourceError."""
    try:
        lines, _ = inspect.getsourcelines(function.__code__)
    except (OSError, TypeError, SyntaxError, IndentationError) as error:
        raise SourceError("has no source to read (made by exec, or in an interactive session)") from error
    text = "".join(lines)
    nested = text[:1].isspace()
    try:
        (top,) = ast.parse(("if 1:\n" if nested else "") + text).body
    except (SyntaxError, ValueError) as error:
        raise SourceError("has no source that can be read by itself") from error
    tree = top.body[0] if isinstance(top, ast.If) else top
    if not isinstance(tree, ast.FunctionDef):
        raise SourceError("is no ordinary function (a lambda or a coroutine)")
    tree.decorator_list = []
    ast.increment_lineno(tree, function.__code__.co_firstlineno - (2 if nested else 1))
    if not _same_code(_compiled(function, tree, ()), function.__code__):
        raise SourceError("does not run what its source says: the file was changed, or the function was rewritten")
    return tree


def build(function: FunctionType, tree: ast.FunctionDef, names: Mapping[str, Any]) -> FunctionType:
    """function with the body of tree, which may also use names. The original's globals and closure stay live."""
    code = _compiled(function, ast.fix_missing_locations(tree), tuple(names))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    closure = tuple(cells[name] if name in cells else CellType(names[name]) for name in code.co_freevars)
    return _function(function, code, closure)


def _function(like: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    made = FunctionType(code, like.__globals__, like.__name__, like.__defaults__, closure)
    made.__kwdefaults__ = like.__kwdefaults__
    made.__annotations__ = like.__annotations__
    made.__qualname__ = like.__qualname__
    made.__module__ = like.__module__
    made.__doc__ = like.__doc__
    made.__dict__.update(like.__dict__)
    return made


def _compiled(function: FunctionType, tree: ast.FunctionDef, names: tuple[str, ...]) -> CodeType:
    """The code of tree where function was defined: in a class of that name, inside a function with those variables."""
    free = [name for name in (*function.__code__.co_freevars, *names) if name != "__class__"]
    body: list[ast.stmt] = [tree]
    owner = ""
    path = function.__qualname__.split(".")
    if "__class__" in function.__code__.co_freevars or (len(path) > 1 and path[-2] != "<locals>"):
        owner = path[-2] if len(path) > 1 and path[-2].isidentifier() else "_"
        body = [_parsed(f"class {owner}: pass", body)]
    imports = [ast.Import([ast.alias(name)]) for name in sorted(_imported(function.__code__.co_filename))]
    own = owner or tree.name
    if own not in free:  # else it would be a variable of _outer
        body = [ast.Global([own]), *body]
    outer = _parsed(f"def _outer({', '.join(free)}): pass", body)
    module = ast.fix_missing_locations(ast.Module([*imports, outer], []))
    flags = function.__code__.co_flags & _FUTURE
    code = compile(module, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    for name in ("_outer", *([owner] if owner else []), tree.name):
        code = next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name)
    return code


@functools.lru_cache(maxsize=64)
def _imported(file: str) -> frozenset[str]:
    """The names that a file imports at its top level: a method call on one of them has bytecode of its own."""
    try:
        pending: list[ast.AST] = [ast.parse("".join(linecache.getlines(file)))]
    except (SyntaxError, ValueError):
        return frozenset()
    names: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            pending += ast.iter_child_nodes(node)
    return frozenset(names - {"*"})


def _parsed(text: str, body: list[ast.stmt]) -> ast.stmt:
    """The one statement of text, a class or a function, with body in it."""
    (statement,) = ast.parse(text).body
    assert isinstance(statement, (ast.ClassDef, ast.FunctionDef))
    statement.body = body
    return statement


def _same_code(one: CodeType, other: CodeType) -> bool:
    if any(getattr(one, name) != getattr(other, name) for name in _COMPARED) or len(one.co_consts) != len(other.co_consts):
        return False
    if (one.co_flags ^ other.co_flags) & ~inspect.CO_NESTED:
        return False
    return all(_same_constant(a, b) for a, b in zip(one.co_consts, other.co_consts))


def _same_constant(one: Any, other: Any) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return _same_code(one, other)
    if isinstance(one, str) and isinstance(other, str) and "<locals>" in one:  # Python 3.10: the name of a nested function
        return one.rpartition(".")[2] == other.rpartition(".")[2]
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_constant, one, other))
    return type(one) is type(other) and (one == other or repr(one) == repr(other))
