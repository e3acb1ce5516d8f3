"""What one call of fuse does with each module of the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import conditions
from .activations import looks_like_activation
from .blocks import block
from .calls import is_linear, learn
from .edit import REFERENCE, Made, Rewrite
from .left import left
from .neighbours import is_sequential, sequential
from .norm_formula import NormFormula
from .rows import block_rows, foreign_row, linear_row
from .run import Run
from .sites import FORMS, PARTS
from .swap import UNDO, class_of, original_class
from .whole import unknown_subclass, whole


def plan(run: Run) -> None:
    """Decide for every module of the model, and enter the report's rows. Nothing is changed yet."""
    learn()
    parts = {id(module): whole(run, name, module) for name, module in run.model.named_modules()}
    linears = [module for module in run.model.modules() if isinstance(module, nn.Linear) or is_linear(module)]
    for linear in linears:
        run.refuses(linear)
    for name, module in run.model.named_modules():
        _module(run, name, module, *parts[id(module)])
    for linear in linears:
        linear_row(run, linear)
    for name, module in run.model.named_modules():
        foreign_row(run, name, module)


def _module(run: Run, name: str, module: nn.Module, mixin: type[nn.Module] | None, formula: NormFormula | None) -> None:
    """Plan the class of one module. mixin and formula: those of a module whose whole forward is one op."""
    cls = original_class(module)
    attributes: dict[str, Any] = {}
    methods: dict[str, Rewrite] = {}
    if is_sequential(cls):
        mixin, attributes = sequential(run, name, module)
    elif formula is None and not looks_like_activation(module):
        before = earlier_edits(module)
        found = block(run, name, module, cls, keys_of(before))
        methods = found.rewrites(frozenset(run.wanted) | parts_of(before))
        run.follows.update((k, v) for k, v in found.reasons.items() if k not in run.follows)
        block_rows(run, found)
        left(run, found)
        unknown_subclass(run, name, module, cls)
    if mixin is not None or methods or formula is not None:
        remove = ("forward",) if conditions.repeats_class_forward(module) else ()
        run.plan(module, Made(cls, tuple(sorted(methods.items())), mixin, formula), remove, **attributes)
    elif UNDO in module.__dict__:
        run.plan(module, class_of(module), **attributes)


def earlier_edits(module: nn.Module) -> tuple[tuple[str, Rewrite], ...]:
    """The edits of a fuse before this one."""
    made = class_of(module)
    return made.methods if isinstance(made, Made) else ()


def keys_of(methods: tuple[tuple[str, Rewrite], ...]) -> frozenset[str]:
    """The keys of all sites, those in functions that the methods name included."""
    found: set[str] = set()
    for _, rewrite in methods:
        for key, extra in rewrite:
            found.add(key)
            if key.startswith(REFERENCE):
                found.update(key + inner[0] for inner in extra)
    return frozenset(found)


def parts_of(methods: tuple[tuple[str, Rewrite], ...]) -> frozenset[str]:
    """The ops that parts of the sites may become, as an earlier fuse was asked."""
    found = {part for _, rewrite in methods for _, extra in rewrite for part in extra if isinstance(part, str)}
    return PARTS & (found | {FORMS[-1] for key in keys_of(methods) if key.startswith(f"{FORMS[-1]}@")})
