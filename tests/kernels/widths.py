"""Which products of a kernel are computed in 32 bits, read from its syntax tree: each kernel with all that it calls, from the top.

An argument of a launch that counts elements (a size, a stride) comes as 32 bits where it fits, and Triton computes in the wider of
two operands' widths. So a row times a stride wraps beyond 2^31 elements unless the row was made 64 bits wide before.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

Width = bool  # whether a value is 64 bits wide
Functions = Mapping[str, ast.FunctionDef]

WIDE = ("tl.int64", "gl.int64")  # in Triton and in Gluon


def functions(sources: Iterable[str]) -> dict[str, ast.FunctionDef]:
    """The functions that Triton compiles, by name."""
    nodes = [node for source in sources for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in nodes if any("jit" in ast.unparse(d) for d in node.decorator_list)}


def narrow_products(known: Functions, name: str) -> list[str]:
    """The products in a kernel, and in what it calls, of an argument that counts elements with something, in 32 bits."""
    kernel = known[name]
    return sorted(set(_Walk(known, kernel, dict.fromkeys(_parameters(kernel), False), _counts(kernel)).found))


def calls(known: Functions, name: str) -> set[str]:
    """A function and all that it calls."""
    found, pending = set[str](), [name]
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            called = [node.func for node in ast.walk(known[name]) if isinstance(node, ast.Call)]
            pending += [function.id for function in called if isinstance(function, ast.Name) and function.id in known]
    return found


def _parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args]


def _constexprs(function: ast.FunctionDef) -> set[str]:
    return {a.arg for a in function.args.args if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)}


def _counts(function: ast.FunctionDef) -> set[str]:
    """The parameters that are sizes or strides of tensors."""
    return {p for p in _parameters(function) if not p.endswith(("_ptr", "_desc"))} - _constexprs(function)


class _Walk:
    """One function with the widths of its arguments; counts: those of them that are arguments of the launch."""

    def __init__(self, known: Functions, function: ast.FunctionDef, widths: dict[str, Width], counts: set[str]) -> None:
        self.known, self.function, self.counts = known, function, counts
        self.widths = dict(widths)
        self.found: list[str] = []
        self.returned: list[Width] = []
        for _ in range(2):  # what a loop widens is wide in its second turn
            self._block(function.body)

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.Assign):
                self._assign(statement.targets[0], statement.value)
            elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                value = ast.BinOp(ast.Name(statement.target.id, ast.Load()), statement.op, statement.value)
                self._assign(statement.target, ast.copy_location(value, statement))
            elif isinstance(statement, ast.For):
                assert isinstance(statement.target, ast.Name)
                self.widths[statement.target.id] = any(self._of_each(getattr(statement.iter, "args", [])))
                self._block(statement.body)
            elif isinstance(statement, ast.If):
                self._of(statement.test)
                self._block(statement.body)
                self._block(statement.orelse)
            elif isinstance(statement, ast.Return) and statement.value is not None:
                self.returned = self._values(statement.value)
            elif isinstance(statement, ast.Expr):
                self._of(statement.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        values = self._values(value)
        if len(values) != len(targets):
            values = [any(values)] * len(targets)
        for name, width in zip(targets, values):
            if isinstance(name, ast.Name):
                self.counts.discard(name.id)
                self.widths[name.id] = width

    def _values(self, value: ast.expr) -> list[Width]:
        if isinstance(value, ast.Tuple):
            return self._of_each(value.elts)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in self.known:
            return self._called(self.known[value.func.id], value)
        return [self._of(value)]

    def _called(self, function: ast.FunctionDef, call: ast.Call) -> list[Width]:
        given = dict(zip(_parameters(function), call.args)) | {k.arg: k.value for k in call.keywords if k.arg}
        counts = {p for p, value in given.items() if isinstance(value, ast.Name) and value.id in self.counts}
        if function is self.function:  # the two halves of a tile, each like the whole
            return [False]
        walk = _Walk(self.known, function, {p: self._of(value) for p, value in given.items()}, counts - _constexprs(function))
        self.found += walk.found
        return walk.returned or [False]

    def _of_each(self, nodes: list[ast.expr]) -> list[Width]:
        return [self._of(node) for node in nodes]

    def _of(self, node: ast.expr) -> Width:
        """Whether a value is 64 bits wide; notes the products inside that are not."""
        if isinstance(node, ast.Name):
            return self.widths.get(node.id, False)
        if isinstance(node, ast.Call):
            return self._of_call(node)
        if isinstance(node, ast.BinOp):
            wide = any([self._of(node.left), self._of(node.right)])
            if isinstance(node.op, ast.Mult) and not wide and any(self._counted(side) for side in (node.left, node.right)):
                self.found.append(f"{self.function.name}: {ast.unparse(node)}")
            return wide
        if isinstance(node, ast.Subscript):
            return self._of(node.value)
        if isinstance(node, ast.IfExp):
            return any(self._of_each([node.body, node.orelse]))
        return any(self._of(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))

    def _of_call(self, node: ast.Call) -> Width:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        if name == "to" and isinstance(node.func, ast.Attribute):
            self._of(node.func.value)
            return ast.unparse(node.args[0]) in WIDE
        if name in self.known:
            return any(self._called(self.known[name], node))
        widths = self._of_each([*node.args, *(k.value for k in node.keywords)])
        if name in ("load", "dot", "arange"):  # floats, and a block's own few elements
            return False
        return any(widths) or any(ast.unparse(a) in WIDE for a in node.args)

    def _counted(self, node: ast.expr) -> bool:
        """Whether a factor is an argument that counts elements, as it is."""
        return isinstance(node, ast.Name) and node.id in self.counts
