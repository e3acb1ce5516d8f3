"""Kernels whose programs loop over tiles or rows: which they are, and that a test takes every program of one round several times.

What a program leaves behind for its next tile, in shared memory, in a pipeline or in a partial sum, shows from the second on.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from contextlib import ContextDecorator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fused_ops.kernels import config
from fused_ops.testing.ptx.gpu import Device

LEAST = 2  # turns of every program
ROWS = {"M", "P"}  # what kernels call a number of rows


class _Scalars(ast.NodeTransformer):
    """Expressions of a kernel as Python's: x.to(type) is x."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "to" else node


class _Loop:
    """A kernel's loop over rows or tiles. assigned: what each name is that the kernel assigns once. bounds: those of tl.range."""

    def __init__(self, assigned: dict[str, ast.expr], bounds: list[ast.expr]) -> None:
        self.assigned, self.bounds = assigned, bounds

    def names(self, expression: ast.expr) -> Iterator[str]:
        """The names that an expression depends on."""
        for node in ast.walk(expression):
            if isinstance(node, ast.Name):
                yield node.id
                if node.id in self.assigned:
                    yield from self.names(self.assigned[node.id])

    def turns(self, arguments: dict[str, Any], program: int, programs: int) -> int:
        """How often a program of a launch with these arguments runs the loop."""
        language = SimpleNamespace(
            cdiv=config.cdiv, minimum=min, int64=None, program_id=lambda _: program, num_programs=lambda _: programs
        )

        def value(expression: ast.expr) -> int:
            names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
            known = {n: arguments[n] if n in arguments else value(self.assigned[n]) for n in names - {"tl", "gl"}}
            return eval(
                ast.unparse(_Scalars().visit(ast.parse(ast.unparse(expression)))), {"tl": language, "gl": language}, known
            )

        return len(range(*map(value, self.bounds)))


def _row_loop(kernel: ast.FunctionDef) -> _Loop | None:
    stores = [node.id for node in ast.walk(kernel) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    count = Counter([*stores, *(parameter.arg for parameter in kernel.args.args)])
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(kernel)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and count[node.targets[0].id] == 1
    }
    for node in ast.walk(kernel):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
            loop = _Loop(assigned, node.iter.args)
            if ROWS & set(loop.names(node.iter.args[min(1, len(node.iter.args) - 1)])):
                return loop
    return None


_KERNELS = [
    node
    for path in sorted(Path(config.__file__).parent.rglob("*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
]
LOOPS = {kernel.name: loop for kernel in _KERNELS if (loop := _row_loop(kernel)) is not None}
TESTED: set[str] = set()  # of them, those that a test is decorated with


class SeveralTurns(ContextDecorator):
    """While active, one or more of these kernels are launched, and every program of each launch runs its loop several times.

    As a decorator of a test, it says for which kernels the test stands.
    """

    def __init__(self, *kernels: str) -> None:
        self.kernels = kernels

    def __call__(self, test: Any) -> Any:
        TESTED.update(self.kernels)
        return super().__call__(test)

    def __enter__(self) -> None:
        self.launched = False
        run = Device.run

        def counted(device: Device, kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
            if kernel.__name__ in self.kernels:
                self.launched = True
                names = [name for name in kernel.arg_names if name not in kwargs]
                arguments = {**dict(zip(names, args)), **kwargs}
                turns = [LOOPS[kernel.__name__].turns(arguments, program, grid) for program in range(grid)]
                assert min(turns) >= LEAST, f"{kernel.__name__}: its programs run their loop {turns} times"
            return run(device, kernel, grid, args, kwargs)

        self.patch = mock.patch.object(Device, "run", counted)
        self.patch.start()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.patch.stop()
        assert kind is not None or self.launched, f"none of {self.kernels} was launched"
