"""Modules whose forward is replaced by its traced graph: fuse_forwards decides which, rewrite makes the graphs."""

from __future__ import annotations

from typing import Any

from .linears import Parent
from .patterns import PATTERNS, Fused
from .report import ALREADY, FUSED, LEFT
from .rewrite import FusedForward, Program, find, forward_class, programs
from .run import Run
from .trace import UntraceableError


def fuse_forwards(run: Run, parents: list[tuple[Parent, frozenset[str]]]) -> None:
    """Replace forwards that hold chains of ops which changing the Linears' classes could not fuse."""
    wanted = run.wanted & PATTERNS.keys()
    for parent, readable in parents:
        if isinstance(parent.module, FusedForward):
            for fused in _fused(parent.module._fuse_programs):
                _record(run, parent, fused, ALREADY)
        elif readable and wanted:
            _one(run, parent, frozenset(wanted), readable)


def _one(run: Run, parent: Parent, wanted: frozenset[str], readable: frozenset[str]) -> None:
    module = parent.module
    found = find(module, wanted, readable)
    if not found:
        return
    try:
        made = programs(module, wanted, readable)
    except UntraceableError as error:
        for fused in found:
            _record(run, parent, fused, LEFT, f"{type(module).__name__}.forward cannot be replaced by its graph: {error}")
        return
    for fused in _fused(made):
        _record(run, parent, fused, FUSED)
    cls: Any = type(module)  # mypy takes a class for unhashable when its instances say they are
    run.swap(module, forward_class(cls), _fuse_wanted=(wanted, readable), _fuse_programs=made)


def _fused(programs: dict[bool, Program]) -> list[Fused]:
    """What the programs fuse, each once, evaluation's first."""
    return list(dict.fromkeys(fused for program in programs.values() for fused in program.fused))


def _class_before(parent: Parent, path: str) -> str:
    return type(parent.module.get_submodule(path)).__name__


def _record(run: Run, parent: Parent, fused: Fused, status: str, reason: str = "") -> None:
    """Enter what a replaced forward fused in the report.

    A Linear with its activation is reported in the Linear's own row, a gated pair or an MLP in the row of the module that
    holds it.
    """
    before = type(parent.module).__name__
    if fused.op == "linear":
        detail = f"with {fused.activation}, called as a function: {before}.forward is replaced by its graph"
        run.record(parent.full(fused.linears[0]), _class_before(parent, fused.linears[0]), "linear", status, reason or detail)
        return
    detail = f"{' and '.join(fused.linears)} with {fused.activation}: forward is replaced by its graph"
    if fused.op == "mlp":
        detail += ", in training only"
    run.record(parent.name, before, fused.op, status, reason or detail)
    if status == FUSED:
        _mention(run, parent, fused)


def _mention(run: Run, parent: Parent, fused: Fused) -> None:
    """Say in the rows of the chain's Linears, where they fused nothing by themselves, what the chain does with them."""
    for path in fused.linears:
        row = run.found.get((parent.full(path), "linear"))
        if row is None or row.status != LEFT:
            continue
        if fused.op == "mlp":
            run.record(row.name, row.module, "linear", LEFT, f"{row.detail}; in training part of the mlp")
        else:
            run.record(row.name, row.module, "linear", FUSED, f"part of the {fused.op}")
