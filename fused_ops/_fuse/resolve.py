"""What the names in a module's source stand for: the objects that an expression such as self.layers[0].fc1 may be.

Nothing of the user's is run: no property, no __getattr__, no call. Where an expression may be one of several, as a loop's
variable is, all of them are answered, in the loop's order. An empty answer means that it is not known.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from .source import Source

Objects = tuple[Any, ...]
_CONTAINERS = (nn.ModuleList, nn.Sequential, list, tuple)
_MAPPINGS = (nn.ModuleDict, dict)
_DEPTH = 8
_CONSTANTS = (bool, int, float, str, type(None))


class Scope:
    """The names of one function as a method of one module (module is None for an ordinary function)."""

    def __init__(self, source: Source, module: nn.Module | None) -> None:
        self.source = source
        self.module = module
        self._self = source.self_name if module is not None else None
        closure = zip(source.function.__code__.co_freevars, source.function.__closure__ or ())
        self._closure = dict(closure)
        self._stores = _stores(source.tree)
        arguments = source.tree.args
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        self._arguments = frozenset(a.arg for a in every if a is not None)

    def objects(self, node: ast.expr, depth: int = 0) -> Objects:
        """What node may be."""
        if depth > _DEPTH:
            return ()
        if isinstance(node, ast.Name):
            return self._name(node.id, depth)
        if isinstance(node, ast.Attribute):
            return _all(_attribute(owner, self._mangled(node.attr)) for owner in self.objects(node.value, depth + 1))
        if isinstance(node, ast.Subscript):
            return _flat(_element(owner, node.slice) for owner in self.objects(node.value, depth + 1))
        if isinstance(node, ast.Constant):
            return (node.value,)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return (-node.operand.value,)  # type: ignore[operator]
        return self._made(node, depth) if isinstance(node, ast.Call) else ()

    def _made(self, node: ast.Call, depth: int) -> Objects:
        """A module of torch's activations, softmax among them, that a forward makes on the spot out of constants."""
        found = self.objects(node.func, depth + 1)
        if len(found) != 1 or not isinstance(found[0], type):
            return ()
        given = [self.objects(part, depth + 1) for part in (*node.args, *(k.value for k in node.keywords))]
        if any(len(values) != 1 for values in given):
            return ()
        values, names = [value for (value,) in given], [k.arg for k in node.keywords]
        if found[0].__module__ != nn.GELU.__module__ or None in names or not all(isinstance(v, _CONSTANTS) for v in values):
            return ()
        try:
            return (found[0](*values[: len(node.args)], **dict(zip(map(str, names), values[len(node.args) :]))),)
        except TypeError:
            return ()

    def elements(self, node: ast.expr) -> Objects:
        """What a loop over node gives."""
        return self._looped(node, (), 0)

    def _mangled(self, name: str) -> str:
        """An attribute's name as the class that the function was defined in has it: __fc is _Class__fc."""
        owner = self.source.function.__qualname__.rpartition(".")[0].rpartition(".")[2].lstrip("_")
        private = name.startswith("__") and not name.endswith("__")
        return f"_{owner}{name}" if private and owner and owner != "<locals>" else name

    def _name(self, name: str, depth: int) -> Objects:
        if name in self._stores:
            if name == self._self:
                return ()
            return _flat(self._stored(value, path, depth) for value, path in self._stores[name])
        if name == self._self:
            return (self.module,)
        if name in self._arguments:
            return ()
        if name in self._closure:
            try:
                return (self._closure[name].cell_contents,)
            except ValueError:
                return ()
        names: Mapping[str, Any] = self.source.function.__globals__
        if name in names:
            return (names[name],)
        return (getattr(builtins, name),) if hasattr(builtins, name) else ()

    def _stored(self, value: ast.expr | None, path: tuple[int | None, ...], depth: int) -> Objects:
        """What a variable holds that value is assigned to (path is empty) or that a loop over value gives (path is (None, ...))."""
        if value is None:
            return ()
        if path[:1] == (None,):
            return self._looped(value, path[1:], depth + 1)
        if path:
            return self.objects(value.elts[path[0]], depth + 1) if isinstance(value, ast.Tuple) and path[0] is not None else ()
        return self.objects(value, depth + 1)

    def _looped(self, value: ast.expr, path: tuple[int | None, ...], depth: int) -> Objects:
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and not value.keywords:
            name, args = value.func.id, value.args
            if name == "zip" and path and path[0] is not None and path[0] < len(args):
                return self._looped(args[path[0]], path[1:], depth)
            if name == "enumerate" and path[:1] == (1,):
                return self._looped(args[0], path[1:], depth)
            if name in ("reversed", "list", "tuple", "iter") and len(args) == 1:
                return self._looped(args[0], path, depth)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in ("values", "children"):
            return () if path else _flat(_items(owner) for owner in self.objects(value.func.value, depth + 1))
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "items":
            return _flat(_items(owner) for owner in self.objects(value.func.value, depth + 1)) if path == (1,) else ()
        if isinstance(value, (ast.Tuple, ast.List)):
            elements = _all(self.objects(element, depth + 1) for element in value.elts)
        else:
            elements = _flat(_items(owner) for owner in self.objects(value, depth + 1))
        for place in path:
            if place is None or not all(isinstance(e, (list, tuple, *_CONTAINERS)) and len(e) > place for e in elements):
                return ()
            elements = tuple(e[place] for e in elements)
        return elements


def _stores(tree: ast.FunctionDef) -> dict[str, list[tuple[ast.expr | None, tuple[int | None, ...]]]]:
    """variable -> the expressions that it gets its values from, each with the way into it. None: not known."""
    found: dict[str, list[tuple[ast.expr | None, tuple[int | None, ...]]]] = {}

    def enter(target: ast.expr, value: ast.expr | None, path: tuple[int | None, ...]) -> None:
        if isinstance(target, ast.Name):
            found.setdefault(target.id, []).append((value, path))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for place, element in enumerate(target.elts):
                enter(element, value, (*path, place))
        elif isinstance(target, ast.Starred):
            enter(target.value, None, ())

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                enter(target, node.value, ())
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            enter(node.target, node.value, ())
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            enter(node.target, node.iter, (None,))
        elif isinstance(node, ast.AugAssign):
            enter(node.target, None, ())
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                if item.optional_vars is not None:
                    enter(item.optional_vars, None, ())
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not tree:
            found.setdefault(node.name, []).append((None, ()))
            inner = node.args if isinstance(node, ast.FunctionDef) else None
            for argument in (*inner.posonlyargs, *inner.args, *inner.kwonlyargs) if inner else ():
                found.setdefault(argument.arg, []).append((None, ()))
        elif isinstance(node, ast.Lambda):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                found.setdefault(argument.arg, []).append((None, ()))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                found.setdefault((alias.asname or alias.name).split(".")[0], []).append((None, ()))
        elif (isinstance(node, ast.ExceptHandler) and node.name) or (
            isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name
        ):
            found.setdefault(node.name, []).append((None, ()))
    return found


def _attribute(owner: Any, name: str) -> Objects:
    """owner.name, as a look-up that runs nothing would find it."""
    if isinstance(owner, nn.Module):
        for table in (owner.__dict__, owner.__dict__.get("_modules", {}), owner.__dict__.get("_parameters", {})):
            if name in table:
                return (table[name],)
        found = inspect.getattr_static(type(owner), name, None)
        return (found,) if found is not None and not _computes(found) else ()
    if isinstance(owner, ModuleType):
        return (vars(owner)[name],) if name in vars(owner) else ()
    if isinstance(owner, type):
        found = inspect.getattr_static(owner, name, None)
        return (found,) if found is not None and not _computes(found) else ()
    return ()


def _computes(found: Any) -> bool:
    """Whether a class's attribute is a descriptor such as a property: what it gives an instance is not known."""
    return hasattr(type(found), "__get__") and not inspect.isfunction(found)


def _element(owner: Any, index: ast.expr) -> Objects:
    """owner[index]: all of owner's where index is no constant."""
    items = _items(owner)
    if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.USub) and isinstance(index.operand, ast.Constant):
        index = ast.Constant(-index.operand.value)  # type: ignore[operator]
    if isinstance(index, ast.Constant):
        if isinstance(owner, _MAPPINGS):
            key: Any = index.value
            return (owner[key],) if key in owner else ()
        if isinstance(index.value, int) and -len(items) <= index.value < len(items):
            return (items[index.value],)
        return ()
    return (tuple(items),) if isinstance(index, ast.Slice) else items


def _items(owner: Any) -> Objects:
    if isinstance(owner, nn.Module):
        containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
        return tuple(owner._modules.values()) if isinstance(owner, containers) else ()
    if isinstance(owner, _MAPPINGS):
        return tuple(owner.values())
    return tuple(owner) if isinstance(owner, (list, tuple)) else ()


def _all(parts: Any) -> Objects:
    """The parts together, or nothing when one of them is not known."""
    found = list(parts)
    return tuple(x for part in found for x in part) if all(found) else ()


_flat = _all
