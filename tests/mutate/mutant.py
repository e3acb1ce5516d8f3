"""A mutant: one fault put into the sources on purpose, and the tests that should notice it."""

from __future__ import annotations

import ast
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREAS = ("kernels", "launch", "autograd", "fuse", "export")


@dataclass(frozen=True)
class Selection:
    """Tests that run together: paths under tests/, separated by spaces, and what their names must hold, as pytest's -k.

    interpreted: whether kernels run in Triton's interpreter, which is a mode of the whole process.
    """

    paths: str
    keyword: str = ""
    interpreted: bool = False

    @property
    def arguments(self) -> list[str]:
        """What pytest is given."""
        chosen = ["-k", self.keyword] if self.keyword else []
        return [*(f"tests/{path}" for path in self.paths.split()), "-m", "not slow and not gpu", *chosen]

    def __str__(self) -> str:
        mode = "interpreted " if self.interpreted else ""
        return f"{mode}{self.paths}{f' -k {self.keyword!r}' if self.keyword else ''}"


def aten(paths: str, keyword: str = "") -> Selection:
    """Tests in the ordinary mode: ATen on the CPU, compiled kernels in tests/ptx."""
    return Selection(paths, keyword)


def interpreted(files: str, keyword: str = "") -> Selection:
    """Tests of tests/interpret, by the names of their files without test_ and .py."""
    return Selection(" ".join(f"interpret/test_{name}.py" for name in files.split()), keyword, True)


@dataclass(frozen=True)
class Mutant:
    """A fault in one file.

    area: one of AREAS. path: the file. runs: the tests, in the order in which they are tried. equivalent: why no test can
    notice it, "" for a mutant that one should.
    """

    id: str
    area: str
    fault: str
    path: str
    runs: tuple[Selection, ...]
    equivalent: str = ""

    def mutated(self, source: str) -> str:
        """The file's text with the fault in it. LookupError where the text has no one place for it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Replacement(Mutant):
    """The one occurrence of `old` in a function or class, or anywhere in the file where `inside` is "", becomes `new`."""

    inside: str = ""
    old: str = ""
    new: str = ""

    def mutated(self, source: str) -> str:
        start, end = 0, len(source)
        if self.inside:
            start, end = _span(source, self.inside, self.id)
        found = source[start:end].count(self.old)
        if found != 1:
            where = f"{self.path}{':' if self.inside else ''}{self.inside}"
            raise LookupError(f"mutant {self.id}: {self.old!r} is found {found} times in {where}, allowed: once")
        return source[:start] + source[start:end].replace(self.old, self.new) + source[end:]


def _span(source: str, name: str, mutant: str) -> tuple[int, int]:
    """Where a function or class lies in a source, by the last part of its name."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
    if len(nodes) != 1:
        raise LookupError(f"mutant {mutant}: {name!r} is defined {len(nodes)} times, allowed: once")
    return offset(source, nodes[0].lineno, 0), offset(source, nodes[0].end_lineno or 0, nodes[0].end_col_offset or 0)


def offset(source: str, line: int, column: int) -> int:
    """The index in source of a position that ast gives: lines from 1, columns in bytes."""
    start, text = _lines(source)[line - 1]
    return start + (column if text.isascii() else len(text.encode()[:column].decode()))


@functools.lru_cache(8)
def _lines(source: str) -> list[tuple[int, str]]:
    """(where it begins, the text) of each line."""
    lines = source.splitlines(keepends=True)
    return list(zip(itertools.accumulate(map(len, lines), initial=0), lines))
