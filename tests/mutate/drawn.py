"""Mutants drawn by fixed operators, the same for a seed as long as what they change is as it was.

A mutant's place in the draw follows from its own text, so that a change elsewhere in the sources leaves the others drawn.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .equivalent import EQUIVALENT
from .mutant import AREAS, ROOT, Mutant
from .selections import runs_of
from .sites import OPERATORS, Site, sites

SEED = 16
QUOTA = {"kernels": 22, "launch": 14, "autograd": 8, "fuse": 8, "export": 8}  # how many of each area
SOURCES = {
    "kernels": ("kernels/softmax/*.py", "kernels/norm/*.py", "kernels/linear/*.py", "kernels/*.py"),
    "launch": ("fused_ops/_runtime/*.py", "fused_ops/ops/*/*_launch.py", "fused_ops/ops/*/*_plan.py", "fused_ops/ops/linear/matmul*.py"),
    "autograd": ("fused_ops/_torch/*.py", "fused_ops/ops/*/*.py"),
    "fuse": ("fused_ops/_fuse/*.py",),
    "export": ("export/*/*.py", "export/*.py"),
}  # fmt: skip
# What has no say in a result: names of ranges, errors' words, progress, tables for people.
LEFT_OUT = frozenset(
    ("kernels/aot.py", "fused_ops/_runtime/nvtx.py", "fused_ops/_runtime/faults.py", "fused_ops/_runtime/notices.py",
     "fused_ops/_fuse/report.py", "export/tensorrt/progress.py", "export/cli/doctor.py", "export/cli/forecast.py",
     "export/cli/headline.py")
)  # fmt: skip


@dataclass(frozen=True)
class Drawn(Mutant):
    """A change at a place that was found when the source was read."""

    source: str = ""
    start: int = 0
    end: int = 0
    new: str = ""

    def mutated(self, source: str) -> str:
        if source != self.source:
            raise LookupError(f"mutant {self.id}: {self.path} is not the file that it was drawn from")
        return source[: self.start] + self.new + source[self.end :]


def _files(area: str) -> Iterator[Path]:
    seen: set[Path] = set()
    for pattern in SOURCES[area]:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path in seen or name in LEFT_OUT or path.name == "__init__.py" or path.stem.endswith("_onnx"):
                continue
            of_an_op = area == "autograd" and name.startswith("fused_ops/ops/")
            if of_an_op and path.stem != "gradients" and "torch.autograd.Function" not in path.read_text():
                continue
            seen.add(path)
            yield path


@functools.cache
def candidates(area: str) -> list[tuple[Path, Site]]:
    """Every site of an area."""
    found = []
    for path in _files(area):
        source, name = path.read_text(), path.relative_to(ROOT).as_posix()
        for site in sites(source, name, kernels=area == "kernels" and path.name != "rows.py"):
            if area != "autograd" or not name.startswith("fused_ops/ops/") or _of_gradients(site.function, path.stem):
                found.append((path, site))
    return found


def _of_gradients(function: str, stem: str) -> bool:
    """Whether a function of an op's file has to do with gradients: the Function's own, and what it calls."""
    return stem == "gradients" or "." in function or function.endswith(("_forward", "_backward"))


def draw(seed: int = SEED) -> list[Drawn]:
    """QUOTA's mutants of each area, at most one in a function; equivalent ones that come before them are drawn too, beyond it."""
    found: list[Drawn] = []
    for area in AREAS:
        ranked = sorted(candidates(area), key=lambda c: hashlib.sha256(f"{seed}:{c[1].name}".encode()).digest())
        most = -(-QUOTA[area] // len(OPERATORS)) + 1  # of one operator
        taken, functions = Counter[str](), set[tuple[Path, str]]()
        for path, site in ranked:
            if sum(taken.values()) == QUOTA[area] or taken[site.operator] == most or (path, site.function) in functions:
                continue
            functions.add((path, site.function))
            found.append(_mutant(area, path, site))
            taken[site.operator] += not found[-1].equivalent
    return found


def _mutant(area: str, path: Path, site: Site) -> Drawn:
    name = path.relative_to(ROOT).as_posix()
    old, new = (" ".join(text.split())[:90] for text in (site.old, site.new))
    return Drawn(
        site.name, area, f"{site.function}: {old} -> {new}", name, runs_of(name, site.function), EQUIVALENT.get(site.name, ""),
        path.read_text(), site.start, site.end, site.new,
    )  # fmt: skip
