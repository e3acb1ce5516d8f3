"""The repository's own Python sources and what each imports, read from their syntax trees."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.packaging.conftest import ROOT

PARTS = ("kernels", "fused_ops", "export", "bench")  # what each may import: those before it


@dataclass(frozen=True)
class Module:
    """One source: its path in the repository and the dotted name it is imported under."""

    path: Path
    name: str

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def source(self) -> str:
        return (ROOT / self.path).read_text()

    def functions(self) -> Iterator[ast.FunctionDef]:
        return (node for node in ast.walk(ast.parse(self.source)) if isinstance(node, ast.FunctionDef))


def files(part: str) -> list[Path]:
    """The part's sources, relative to the root; the links fused_ops/kernels and fused_ops/export are not followed."""
    inside = [p.relative_to(ROOT) for p in (ROOT / part).rglob("*.py")]
    return sorted(p for p in inside if not (part == "fused_ops" and p.parts[1] in ("kernels", "export")))


def module_name(path: Path) -> str:
    """fused_ops.kernels.norm.layer_norm for kernels/norm/layer_norm.py: kernels and export are inside fused_ops."""
    parts = list(path.with_suffix("").parts)
    parts = ["fused_ops", *parts] if parts[0] in ("kernels", "export") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Module]:
    """Every module of the four parts by its dotted name."""
    found = [Module(path, module_name(path)) for part in PARTS for path in files(part)]
    return {module.name: module for module in found}


def imported_names(path: Path, source: str) -> set[str]:
    """Every dotted name the source imports, inside functions too; relative imports resolved, names of `from` imports appended.

    Imports under `if TYPE_CHECKING:` count too: what reads an annotation follows them.
    """
    tree = ast.parse(source)
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{home}.{alias.name}" for alias in node.names)
    return names


def loaded(module: Module, known: dict[str, Module]) -> set[str]:
    """The modules of known that importing or running module loads: what it names, and the packages around that.

    A package around module itself is loaded before it in any case, and does not count.
    """
    found = set()
    for name in imported_names(module.path, module.source):
        target = name if name in known else name.rpartition(".")[0]
        if target in known:
            around = [target.rsplit(".", i)[0] for i in range(target.count(".") + 1)]
            found |= {name for name in around if name in known and not f"{module.name}.".startswith(f"{name}.")}
            found.add(target)
    return found - {module.name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import one another in a circle."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        pending, seen = list(graph[start]), set()
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += graph.get(name, ())
        reached[start] = seen
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph if name in reached[name]}
    return sorted(sorted(group) for group in groups)
