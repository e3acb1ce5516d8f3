"""The report's rows of what was chosen, and of every Linear: fused, or left with the reason."""

from __future__ import annotations

import re

from torch import nn

from ..nn import FusedLinear
from . import conditions
from .blocks import Block, Method
from .calls import is_linear
from .edit import REFERENCE
from .neighbours import neighbours
from .report import ALREADY, FUSED, LEFT
from .run import Run
from .sites import FORMS, PARTS
from .swap import original_class
from .verdicts import Verdict

ONE_KERNEL = "F.linear is already one kernel"
_LINEAR = FORMS[-1]
_LINEAR_NAME = re.compile(r"Linear(\d+bit\w*)?$")


def block_rows(run: Run, found: Block) -> None:
    """The rows of a module's sites, and of those in the functions that its methods name."""
    holder = original_class(found.module).__name__
    for method in found.methods:
        for entry in method.verdicts:
            key, count = f"{method.name} {entry.site.key}", found.counts(method, entry.site.root)
            if entry.op == "chain":
                ops = PARTS & run.wanted if entry.reason is None else frozenset()
                earlier = PARTS if entry.site.key in found.earlier else frozenset()
                neighbours(run, found.name, holder, entry.linears[0], ops, earlier)
            elif not entry.linears:
                status = _status(found, method, entry)
                why = entry.reason or run.left_out(entry.op, found.module) or "part of something larger"
                detail = why if status == LEFT else f"{entry.where} in {holder}.{method.name}"
                run.record(found.name, holder, entry.op, status, detail, count, key)
            elif entry.op == _LINEAR:
                _activated(run, found, method, entry)
            else:
                _larger(run, found, method, entry, holder)
    for name, function, _, verdicts in found.functions:
        here = found.calls(name, function)
        for entry in verdicts:
            status = ALREADY if REFERENCE + function + entry.site.key in found.earlier else FUSED
            detail = f"{entry.where} in {function}" + ("" if here else ", which is not called as the model is configured")
            run.record(found.name, holder, entry.op, status, detail, int(here), f"{name} {function}")


def _status(found: Block, method: Method, entry: Verdict) -> str:
    if entry not in method.chosen:
        return LEFT
    return ALREADY if entry.site.key in found.earlier else FUSED


def _activated(run: Run, found: Block, method: Method, entry: Verdict) -> None:
    """The rows of the Linears of act(linear(x)): fused by themselves, as the first half of an MLP or a gate, or not."""
    larger = [v for v in method.chosen if v.op != _LINEAR and entry.site.nodes <= v.site.nodes]
    gates = any(len(v.site.inputs) > 1 for v in larger)
    chosen = entry in method.chosen or gates or (bool(larger) and _LINEAR in run.wanted)
    known = any(v.site.key in found.earlier for v in (entry, *larger))
    count = found.counts(method, entry.site.root)
    for (linear,) in entry.linears:
        name, cls = run.names.get(id(linear), ""), type(linear).__name__
        if chosen:
            run.used.add(id(linear))
            detail = f"with {entry.activation} ({entry.where})" + conditions.torch_fast_path(found.module)
            run.record(name, cls, _LINEAR, ALREADY if known else FUSED, detail, count)
        else:
            reason = entry.reason or run.left_out(_LINEAR, linear) or "part of something larger"
            run.record(name, cls, _LINEAR, LEFT, reason, count)


def _larger(run: Run, found: Block, method: Method, entry: Verdict, holder: str) -> None:
    """The row of a gate or an MLP, which is that of the module that holds it, and of the Linear that only it takes."""
    status = _status(found, method, entry)
    gate, key = len(entry.site.inputs) > 1, f"{method.name} {entry.site.key}"
    count = found.counts(method, entry.site.root) if gate else 0
    if status == LEFT:
        if gate and not any(v is not entry and v.site.root is entry.site.root and v.reason is None for v in method.verdicts):
            reasons = (run.left_out(entry.op, linear) for row in entry.linears for linear in row)
            reason = entry.reason or next((r for r in reasons if r is not None), "part of something larger")
            run.record(found.name, holder, entry.op, LEFT, reason, count, key)
        return
    for row in entry.linears:
        names = [_local(run, found, linear) for linear in row]
        detail = f"{' and '.join(names)} with {entry.activation}" + ("" if gate else ", in training only")
        run.record(found.name, holder, entry.op, status, detail, count, key if run.has(found.name, entry.op) else "")
        if gate:
            run.used.add(id(row[1]))
            run.record(run.names.get(id(row[1]), ""), type(row[1]).__name__, _LINEAR, status, f"part of the {entry.op}")


def _local(run: Run, found: Block, linear: nn.Module) -> str:
    name = run.names.get(id(linear), "")
    return name.removeprefix(f"{found.name}.") if found.name else name


def foreign_row(run: Run, name: str, module: nn.Module) -> None:
    """The row of what another library has put in a Linear's place."""
    cls = type(module)
    if not isinstance(module, nn.Linear) and not is_linear(module) and _LINEAR_NAME.search(cls.__name__):
        reason = f"{cls.__module__}.{cls.__name__} is no torch.nn.Linear (quantised, or another library's)"
        run.record(name, cls.__name__, _LINEAR, LEFT, reason)


def linear_row(run: Run, linear: nn.Module) -> None:
    """The row of a Linear that no activation follows, or that nothing was found to call; fuses it where that was asked for."""
    name, cls = run.names.get(id(linear), ""), type(linear)
    bare = "bare_linear" in run.wanted and cls is nn.Linear and conditions.parameters(linear) is None
    if id(linear) in run.used or (run.has(name, _LINEAR) and not bare):
        return
    if cls is FusedLinear:
        activation = linear.__dict__.get("activation")
        detail = f"is a FusedLinear with {activation}" if activation else "is a FusedLinear"
        run.record(name, cls.__name__, _LINEAR, ALREADY, detail)
        return
    follows = run.follows.get(id(linear))
    parent = run.model.get_submodule(name.rpartition(".")[0]) if name else None
    reason = run.refuses(linear) or (conditions.in_peft(parent) if parent is not None else None)
    if reason is None and (not is_linear(linear) or (follows is None and cls is not nn.Linear)):
        reason = conditions.subclass(linear, nn.Linear)
    if reason is None and bare:
        run.plan(linear, FusedLinear, ("forward",) if conditions.repeats_class_forward(linear) else (), activation=None)
        run.record(name, cls.__name__, _LINEAR, FUSED, "without activation")
        return
    if reason is None:
        reason = follows or "no call of it was found in the source of the modules that hold it"
        reason = f"{reason}: {ONE_KERNEL}" if "follows" in reason else reason
    run.record(name, cls.__name__, _LINEAR, LEFT, reason)
