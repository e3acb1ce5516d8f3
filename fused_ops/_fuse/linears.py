"""Linear with the activation that follows it: which pairs of a model can become one kernel, and making them so."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn import FusedLinear
from . import activations, conditions, hf
from .activation_classes import activation_classes, module_activation
from .match import Match, Verdict, match_linears
from .report import ALREADY, FUSED, LEFT
from .run import Run
from .trace import UntraceableError, paths

ONE_KERNEL = "F.linear is already one kernel"
_NAMES = frozenset(("relu", "relu_", "gelu", "silu", "sigmoid", "tanh"))
_LINEAR_NAME = re.compile(r"Linear(\d+bit\w*)?$")
_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Parent:
    """A module that calls Linears, with the paths of its Linears and activations, those inside its ModuleLists included."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Module] = field(default_factory=dict)
    activations: dict[str, nn.Module] = field(default_factory=dict)
    fused: dict[str, nn.Module] = field(default_factory=dict)  # its FusedLinears

    def full(self, path: str) -> str:
        return f"{self.name}.{path}" if self.name else path


def linear_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """The classes that are a Linear, each with its fused subclass."""
    table: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear}
    if (classes := hf.classes()) is not None:
        table[classes.Conv1D] = classes.FusedConv1D
    return table


def fuse_linears(run: Run) -> list[tuple[Parent, frozenset[str]]]:
    """Fuse Linears with the activations that follow them, by changing classes.

    What only a new forward can fuse is left to forwards.py. Returns each parent with the paths of those of its Linears that
    a new forward may read.
    """
    for name, module in run.model.named_modules():
        _already_or_unknown(run, name, module)
    parents = parents_of(run.model)
    held = owners(parents)
    found = []
    for parent in parents:
        left = {path: r for path, m in parent.linears.items() if (r := run.refused(parent.full(path), m)) is not None}
        found.append((parent, _readable(parent, left, held)))
        if not {"linear", "bare_linear"} & run.wanted:
            left = {path: left.get(path, '"linear" is not in ops') for path in parent.linears}
        for path, verdict in verdicts_of(parent, left, held).items():
            _one(run, parent, path, verdict, path not in left)
    if type(run.model) in linear_classes():
        run.record("", type(run.model).__name__, "linear", LEFT, f"no activation follows: {ONE_KERNEL}")
    return found


def _already_or_unknown(run: Run, name: str, module: nn.Module) -> None:
    known = linear_classes()
    if type(module) in known.values():
        activation = module.__dict__.get("activation")
        what = f"is a {type(module).__name__}" + (f" with {activation}" if activation else "")
        run.record(name, type(module).__name__, "linear", ALREADY, what)
    elif type(module) not in known and (base := next((c for c in known if isinstance(module, c)), None)) is not None:
        run.record(name, type(module).__name__, "linear", LEFT, conditions.subclass(module, base))
    elif type(module) not in known and _LINEAR_NAME.search(type(module).__name__):
        reason = f"{type(module).__module__}.{type(module).__name__} is no torch.nn.Linear (quantised, or another library's)"
        run.record(name, type(module).__name__, "linear", LEFT, reason)


def _one(run: Run, parent: Parent, path: str, verdict: Verdict, allowed: bool) -> None:
    linear, name = parent.linears[path], parent.full(path)
    before = type(linear).__name__
    if (known := run.found.get((name, "linear"))) is not None and known.status == FUSED:
        return
    if isinstance(verdict, Match) and verdict.site.kind != "call" and "linear" in run.wanted:
        run.record(name, before, "linear", FUSED, _apply(run, parent, path, verdict))
    elif "bare_linear" in run.wanted and allowed and type(linear) is nn.Linear and conditions.parameters(linear) is None:
        run.swap(linear, linear_classes()[type(linear)], activation=None)
        run.record(name, before, "linear", FUSED, "without activation")
    elif isinstance(verdict, Match):
        run.record(
            name, before, "linear", LEFT, f"{verdict.activation} is called as a function in {type(parent.module).__name__}"
        )
    else:
        run.record(name, before, "linear", LEFT, verdict)


def parents_of(model: nn.Module) -> list[Parent]:
    """Every module that has Linears of its own, in the model's order."""
    known = linear_classes()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        parent = Parent(name, module)
        seen: set[int] = set()
        for path, child in _children(module):
            if id(child) in seen:
                continue
            seen.add(id(child))
            if type(child) in known:
                parent.linears[path] = child
            elif type(child) in known.values():
                parent.fused[path] = child
            elif module_activation(child) is not None:
                parent.activations[path] = child
        if parent.linears or parent.activations or parent.fused:
            found.append(parent)
    return found


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            for path, grandchild in _children(child):
                yield f"{name}.{path}", grandchild
        else:
            yield name, child


def owners(parents: list[Parent]) -> dict[int, list[str]]:
    """id of a Linear or activation -> the names of the modules that hold it."""
    held: dict[int, list[str]] = {}
    for parent in parents:
        for child in (*parent.linears.values(), *parent.activations.values(), *parent.fused.values()):
            held.setdefault(id(child), []).append(parent.name or "the model")
    return held


def verdicts_of(parent: Parent, left: dict[str, str], held: dict[int, list[str]]) -> dict[str, Verdict]:
    """For each Linear of parent: what to fuse it with, or why not. left: path -> a reason known before."""
    verdicts: dict[str, Verdict] = {path: reason for path, reason in left.items() if path in parent.linears}
    for path, linear in parent.linears.items():
        if path not in verdicts and (reason := _reason(parent, linear, held)) is not None:
            verdicts[path] = reason
    open_ones = set(parent.linears) - set(verdicts)
    if not open_ones:
        return verdicts
    if not _has_activation(parent):
        return verdicts | {path: f"no activation seen in {type(parent.module).__name__}: {ONE_KERNEL}" for path in open_ones}
    if (replaced := conditions.replaced_forward(parent.module)) is not None:
        return verdicts | {path: f"{type(parent.module).__name__}: {replaced}" for path in open_ones}
    fixed = {path: reason for path, a in parent.activations.items() if (reason := _fixed(a, held)) is not None}
    try:
        graphs = paths(parent.module, _entry(parent.module))
    except UntraceableError as error:
        return verdicts | {path: f"{type(parent.module).__name__}.forward is no fixed graph: {error}" for path in open_ones}
    return verdicts | match_linears(parent.module, graphs, open_ones, fixed)


def _reason(parent: Parent, linear: nn.Module, held: dict[int, list[str]]) -> str | None:
    return (
        conditions.in_peft(parent.module)
        or conditions.hooks(linear)
        or conditions.replaced_forward(linear)
        or conditions.parameters(linear)
        or _shared(linear, held)
    )


def _fixed(activation: nn.Module, held: dict[int, list[str]]) -> str | None:
    return conditions.hooks(activation) or conditions.replaced_forward(activation) or _shared(activation, held)


def _shared(module: nn.Module, held: dict[int, list[str]]) -> str | None:
    return f"is shared by {' and '.join(held[id(module)])}" if len(held[id(module)]) > 1 else None


def _entry(parent: nn.Module) -> str:
    """The method to trace. torch's Transformer layers branch on far more than their feed-forward block needs."""
    for cls in _TORCH_LAYERS:
        if isinstance(parent, cls) and type(parent).forward is cls.forward:
            return "_ff_block"
    return "forward"


def _has_activation(parent: Parent) -> bool:
    """Whether parent could apply an activation. Cheaper than a trace; most modules with Linears do not."""
    if parent.activations or any(activations.function_activation(v) for v in parent.module.__dict__.values() if callable(v)):
        return True
    for cls in type(parent.module).__mro__:
        if cls is nn.Module:
            break
        for value in vars(cls).values():
            code = getattr(value, "__code__", None)
            if code is not None and not _NAMES.isdisjoint(code.co_names):
                return True
    return False


def _apply(run: Run, parent: Parent, path: str, match: Match) -> str:
    """Fuse the Linear at path with its activation, in place; returns what the report says."""
    linear = parent.linears[path]
    run.swap(linear, linear_classes()[type(linear)], activation=match.activation)
    table, _, key = path.rpartition(".")
    place = (parent.module.get_submodule(table)._modules, key)
    if match.site.kind == "module":
        module: Any = parent.module.get_submodule(match.site.name)
        if isinstance(module, activations.Absorbed):  # an earlier Linear shares it
            module._fuse_linears += (place,)
        else:
            run.swap(module, activation_classes()[type(module)][0], _fuse_linears=(place,))
    else:
        held = parent.module.__dict__[match.site.name]
        if isinstance(held, activations.AbsorbedFunction):
            held._fuse_linears += (place,)
        else:
            function = activations.AbsorbedFunction((place,))
            run.swap(parent.module, type(parent.module), **{match.site.name: function})
    return f"with {match.activation} ({match.site.name})" + conditions.torch_fast_path(parent.module)


def _readable(parent: Parent, left: Collection[str], held: dict[int, list[str]]) -> frozenset[str]:
    """The paths of parent's Linears whose weights a rewritten forward may read."""
    if conditions.replaced_forward(parent.module) is not None:
        return frozenset()
    linears = {path: linear for path, linear in {**parent.linears, **parent.fused}.items() if path not in left}
    return frozenset(path for path, linear in linears.items() if _reason(parent, linear, held) is None)
