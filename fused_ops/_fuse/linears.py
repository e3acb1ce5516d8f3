"""Linear with the activation that follows it: which pairs of a model can become one kernel, and making them so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn import FusedLinear
from . import activations, conditions, hf
from .activations import absorbed
from .match import Match, Verdict, match_linears
from .swap import swap
from .trace import UntraceableError, paths

ONE_KERNEL = "F.linear is already one kernel"
_NAMES = frozenset(("relu", "relu_", "gelu", "silu", "sigmoid", "tanh"))
_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Parent:
    """A module that calls Linears, with the paths of its Linears and activations, through ModuleLists where need be."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Module] = field(default_factory=dict)
    activations: dict[str, nn.Module] = field(default_factory=dict)

    def full(self, path: str) -> str:
        return f"{self.name}.{path}" if self.name else path


def linear_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """The classes that are a Linear, each with its fused subclass."""
    table: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear}
    if (classes := hf.classes()) is not None:
        table[classes.Conv1D] = classes.FusedConv1D
    return table


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
            elif activations.module_activation(child) is not None:
                parent.activations[path] = child
        if parent.linears or parent.activations:
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
        for child in (*parent.linears.values(), *parent.activations.values()):
            held.setdefault(id(child), []).append(parent.name or "the model")
    return held


def verdicts_of(parent: Parent, left: dict[str, str], held: dict[int, list[str]]) -> dict[str, Verdict]:
    """For each Linear of parent what to fuse it with, or why not. left: path -> a reason already known."""
    verdicts: dict[str, Verdict] = {path: reason for path, reason in left.items() if path in parent.linears}
    for path, linear in parent.linears.items():
        if path not in verdicts and (reason := _reason(parent, linear, held)) is not None:
            verdicts[path] = reason
    open_ones = set(parent.linears) - set(verdicts)
    if not open_ones:
        return verdicts
    if not _has_activation(parent):
        return verdicts | {path: f"no activation in {type(parent.module).__name__}: {ONE_KERNEL}" for path in open_ones}
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
    """The method to trace: torch's Transformer layers branch on far more than their feed-forward block needs."""
    for cls in _TORCH_LAYERS:
        if isinstance(parent, cls) and type(parent).forward is cls.forward:
            return "_ff_block"
    return "forward"


def _has_activation(parent: Parent) -> bool:
    """Whether parent could apply an activation: cheaper than a trace, and most modules with Linears do not."""
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


def apply(parent: Parent, path: str, match: Match, changed: list[nn.Module]) -> str:
    """Fuse the Linear at path with its activation, in place; returns what the report says."""
    linear = parent.linears[path]
    swap(linear, linear_classes()[type(linear)], activation=match.activation)
    changed.append(linear)
    if match.site.kind == "module":
        module = parent.activations.get(match.site.name)
        if module is not None and type(module) in activations.modules():  # not yet absorbed by an earlier Linear
            swap(module, activations.modules()[type(module)][0])
            changed.append(module)
    elif parent.module.__dict__[match.site.name] is not absorbed:
        swap(parent.module, type(parent.module), **{match.site.name: absorbed})
        changed.append(parent.module)
    return f"with {match.activation} ({match.site.name})" + _fast_path(parent.module)


def _fast_path(parent: nn.Module) -> str:
    if not isinstance(parent, nn.TransformerEncoderLayer) or not parent.activation_relu_or_gelu:
        return ""
    return "; in eval without grad torch's own fast path, which reads the weights directly, runs instead where it applies"


def describe(match: Match) -> str:
    return f"{match.activation} is called as a function in forward"


def any_linear(module: nn.Module) -> Any:
    """The known Linear class that module is an unknown subclass of, or None."""
    return next((cls for cls in linear_classes() if isinstance(module, cls) and type(module) is not cls), None)
