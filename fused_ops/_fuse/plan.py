"""What one call of fuse does with each module of the model, and what the report says of it."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..nn import FusedLinear
from . import conditions
from .activations import looks_like_activation
from .blocks import Block, Method, block
from .calls import is_linear, learn
from .edit import REFERENCE, Made, Rewrite
from .left import left
from .neighbours import is_sequential, neighbours, sequential
from .report import ALREADY, FUSED, LEFT
from .run import Run
from .sites import FORMS, PARTS
from .swap import class_of, original_class
from .verdicts import Verdict
from .whole import unknown_subclass, whole

_LINEAR_NAME = re.compile(r"Linear(\d+bit\w*)?$")
ONE_KERNEL = "F.linear is already one kernel"


def plan(run: Run) -> None:
    """Decide for every module of the model. Nothing is changed yet."""
    learn()
    parts: dict[int, tuple[type[nn.Module] | None, Any]] = {}
    for name, module in run.model.named_modules():
        parts[id(module)] = whole(run, name, module)
    linears = [module for module in run.model.modules() if isinstance(module, nn.Linear) or is_linear(module)]
    for linear in linears:
        run.refuses(linear)
    said: dict[int, str] = {}
    used: set[int] = set()
    for name, module in run.model.named_modules():
        _module(run, name, module, parts[id(module)], said, used)
    for linear in linears:
        _linear(run, linear, said, used)
    for name, module in run.model.named_modules():
        _foreign(run, name, module)


def _module(
    run: Run, name: str, module: nn.Module, part: tuple[type[nn.Module] | None, Any], said: dict[int, str], used: set[int]
) -> None:
    cls = original_class(module)
    mixin, formula = part
    attributes: dict[str, Any] = {}
    earlier = earlier_edits(module)
    methods: dict[str, Rewrite] = {}
    if is_sequential(cls):
        mixin, attributes = sequential(run, name, module, said, used)
    elif formula is None and not looks_like_activation(module):
        found = block(run, name, module, cls, keys_of(earlier))
        methods = found.rewrites(frozenset(run.wanted) | parts_of(earlier))
        said.update((k, v) for k, v in found.reasons.items() if k not in said)
        _report(run, found, keys_of(earlier), said, used)
        left(run, found)
        unknown_subclass(run, name, module, cls)
    put = _class(cls, methods, mixin, formula)
    remove = ("forward",) if put is not cls and conditions.repeats_class_forward(module) else ()
    if put is not cls or module.__dict__.get("_fuse_undo"):
        run.plan(module, class_of(module) if put is cls else put, remove, **attributes)


def _class(cls: type[nn.Module], methods: dict[str, Rewrite], mixin: type[nn.Module] | None, formula: Any) -> Any:
    if mixin is None and not methods and formula is None:
        return cls
    return Made(cls, tuple(sorted(methods.items())), mixin, formula)


def earlier_edits(module: nn.Module) -> tuple[tuple[str, Rewrite], ...]:
    made = class_of(module)
    return made.methods if isinstance(made, Made) else ()


def keys_of(methods: tuple[tuple[str, Rewrite], ...]) -> frozenset[str]:
    """The keys of all sites, those in functions that the methods name included."""
    found: set[str] = set()
    for _, rewrite in methods:
        for key, extra in rewrite:
            found.add(key)
            if key.startswith(REFERENCE) and isinstance(extra, tuple):
                found.update(key + inner[0] for inner in extra)
    return frozenset(found)


def parts_of(methods: tuple[tuple[str, Rewrite], ...]) -> frozenset[str]:
    """The ops that parts of the sites may become, as an earlier fuse was asked."""
    found = {part for _, rewrite in methods for _, extra in rewrite for part in extra if isinstance(part, str)}
    return PARTS & (found | {"linear" for key in keys_of(methods) if key.startswith("linear@")})


def _report(run: Run, found: Block, earlier: frozenset[str], said: dict[int, str], used: set[int]) -> None:
    before = original_class(found.module).__name__
    for method in found.methods:
        for entry in method.verdicts:
            status = _status(entry, method, earlier)
            if entry.op == "chain":
                ops = frozenset(run.wanted & PARTS) if entry.reason is None else frozenset()
                neighbours(
                    run, found.name, before, entry.linears[0], ops, PARTS if status == ALREADY else frozenset(), said, used
                )
            elif not entry.linears:
                detail = f"{entry.where} in {before}.{method.name}" if status != LEFT else _why(run, found.module, entry)
                run.record(
                    found.name,
                    before,
                    entry.op,
                    status,
                    detail,
                    found.counts(method, entry.site.root),
                    f"{method.name} {entry.site.key}",
                )
            elif entry.op == "linear":
                _linear_rows(run, found, method, entry, earlier, used)
        _larger(run, found, method, earlier, used, before)
    for method_name, function, _, verdicts in found.functions:
        here = found.calls(method_name, function)
        for entry in verdicts:
            status = ALREADY if REFERENCE + function + entry.site.key in earlier else FUSED
            note = "" if here else ", which is not called as the model is configured"
            run.record(
                found.name,
                before,
                entry.op,
                status,
                f"{entry.where} in {function}{note}",
                int(here),
                f"{method_name} {function}",
            )


def _status(entry: Verdict, method: Method, earlier: frozenset[str]) -> str:
    if entry not in method.chosen:
        return LEFT
    return ALREADY if entry.site.key in earlier else FUSED


def _why(run: Run, module: nn.Module, entry: Verdict) -> str:
    return entry.reason or run.left_out(entry.op, module) or "part of something larger"


def _linear_rows(run: Run, found: Block, method: Method, entry: Verdict, earlier: frozenset[str], used: set[int]) -> None:
    """The rows of the Linears of act(linear(x)): fused by themselves, as the first half of an MLP or a gate, or not."""
    larger = [v for v in method.chosen if v.op != "linear" and entry.site.nodes <= v.site.nodes]
    chosen = entry in method.chosen or (bool(larger) and "linear" in run.wanted) or any(v.op == "gated_linear" for v in larger)
    known = entry.site.key in earlier or any(v.site.key in earlier for v in larger)
    count = found.counts(method, entry.site.root)
    for (linear,) in entry.linears:
        name = run.names.get(id(linear), "")
        if chosen:
            used.add(id(linear))
            detail = f"with {entry.activation} ({entry.where})" + conditions.torch_fast_path(found.module)
            run.record(name, type(linear).__name__, "linear", ALREADY if known else FUSED, detail, count)
        else:
            reason = (
                entry.reason
                or run.refuses(linear)
                or ('"linear" is not in ops' if "linear" not in run.wanted else "part of something larger")
            )
            run.record(name, type(linear).__name__, "linear", LEFT, reason, count)


def _larger(run: Run, found: Block, method: Method, earlier: frozenset[str], used: set[int], before: str) -> None:
    """The rows of gates and MLPs, which are those of the module that holds them."""
    for entry in method.verdicts:
        if entry.op not in FORMS or entry.op == "linear":
            continue
        status = _status(entry, method, earlier)
        names = [tuple(_local(run, found, linear) for linear in row) for row in entry.linears]
        spelled = " and ".join(names[0]) if names else ""
        key = f"{method.name} {entry.site.key}" if len(found.methods) > 1 or status == LEFT else ""
        if status == LEFT:
            if entry.op == "gated_linear" and not _swallowed(entry, method) and entry.linears:
                run.record(
                    found.name,
                    before,
                    entry.op,
                    LEFT,
                    entry.reason or _refusal(run, entry),
                    found.counts(method, entry.site.root),
                )
            continue
        detail = f"{spelled} with {entry.activation}" + (", in training only" if entry.op == "mlp" else "")
        count = int(entry.op != "mlp") * found.counts(method, entry.site.root)
        run.record(found.name, before, entry.op, status, detail, count, key)
        for row in entry.linears:
            _partners(run, row, entry, status, used)


def _swallowed(entry: Verdict, method: Method) -> bool:
    return any(
        v is not entry and v.site.root is entry.site.root and (v in method.chosen or v.reason is None) for v in method.verdicts
    )


def _refusal(run: Run, entry: Verdict) -> str:
    reasons = (run.refuses(linear) for row in entry.linears for linear in row)
    return next((r for r in reasons if r is not None), f'"{entry.op}" is not in ops')


def _partners(run: Run, row: tuple[nn.Module, ...], entry: Verdict, status: str, used: set[int]) -> None:
    """The row of the Linear that a larger call takes besides the activated one."""
    if entry.op == "gated_linear":
        used.add(id(row[1]))
        run.record(run.names.get(id(row[1]), ""), type(row[1]).__name__, "linear", status, "part of the gated_linear")


def _local(run: Run, found: Block, linear: nn.Module) -> str:
    name = run.names.get(id(linear), "")
    return name.removeprefix(f"{found.name}.") if found.name else name


def _foreign(run: Run, name: str, module: nn.Module) -> None:
    """The row of what another library has put in a Linear's place."""
    cls = type(module)
    if not isinstance(module, nn.Linear) and not is_linear(module) and _LINEAR_NAME.search(cls.__name__):
        reason = f"{cls.__module__}.{cls.__name__} is no torch.nn.Linear (quantised, or another library's)"
        run.record(name, cls.__name__, "linear", LEFT, reason)


def _linear(run: Run, linear: nn.Module, said: dict[int, str], used: set[int]) -> None:
    """The row of a Linear that no activation follows, or that nothing was found to call."""
    name, cls = run.names.get(id(linear), ""), type(linear)
    bare = "bare_linear" in run.wanted and cls is nn.Linear and conditions.parameters(linear) is None
    if id(linear) in used or (run.has(name, "linear") and not bare):
        return
    if cls is FusedLinear:
        activation = linear.__dict__.get("activation")
        run.record(
            name, cls.__name__, "linear", ALREADY, f"is a FusedLinear with {activation}" if activation else "is a FusedLinear"
        )
        return
    parent = run.model.get_submodule(name.rpartition(".")[0]) if name else None
    reason = run.refuses(linear) or (conditions.in_peft(parent) if parent is not None else None)
    if reason is None and (not is_linear(linear) or (id(linear) not in said and cls is not nn.Linear)):
        reason = conditions.subclass(linear, nn.Linear)
    if reason is None and bare:
        run.plan(linear, FusedLinear, ("forward",) if conditions.repeats_class_forward(linear) else (), activation=None)
        run.record(name, cls.__name__, "linear", FUSED, "without activation")
        return
    follows = said.get(id(linear), "no call of it was found in the source of the modules that hold it")
    run.record(
        name, cls.__name__, "linear", LEFT, reason or f"{follows}: {ONE_KERNEL}" if "follows" in follows else reason or follows
    )
