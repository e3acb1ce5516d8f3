"""fuse(model) and unfuse(model)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from .. import nn as fused
from . import conditions
from .linears import ONE_KERNEL, Parent, any_linear, apply, describe, linear_classes, owners, parents_of, verdicts_of
from .match import Match
from .report import ALREADY, FUSED, LEFT, Candidate, FuseReport
from .swap import restore, swap

OPS = ("layer_norm", "rms_norm", "softmax", "linear")
OPTIONAL_OPS = ("bare_linear",)
FilterFn = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Whole:
    """A torch.nn class that one fused class replaces whole. cls is None while the op does not exist."""

    op: str
    cls: type[nn.Module] | None


WHOLE: dict[type[nn.Module], Whole] = {
    nn.LayerNorm: Whole("layer_norm", fused.FusedLayerNorm),
    nn.RMSNorm: Whole("rms_norm", getattr(fused, "FusedRMSNorm", None)),
    nn.Softmax: Whole("softmax", fused.FusedSoftmax),
}


def fuse(
    model: nn.Module, ops: Iterable[str] | None = None, filter_fn: FilterFn | None = None, strict: bool = False
) -> FuseReport:
    """Make a model compute with fused kernels, in place, and say for every candidate what was done or why not.

    nn.LayerNorm and nn.Softmax become fused_ops.nn's modules. A Linear (or transformers' Conv1D) followed by an activation
    becomes one fused_linear, and the activation an identity: the activation may be a torch.nn or transformers module, or a
    function that the parent module holds as an attribute. Parameters, state_dict keys, hooks, devices, weight tying,
    pickling and deepcopy stay as they are. Calling it again changes nothing more; unfuse(model) takes all of it back.

    Args:
        model: any nn.Module. Fuse before torch.compile, FSDP or tensor parallelism, and after PEFT adapters are added.
        ops: which of "layer_norm", "rms_norm", "softmax", "linear" (with its activation) to fuse; None is all of them.
            "bare_linear" (a Linear without activation) only when named: cuBLAS already does it in one kernel.
        filter_fn: filter_fn(name, module) -> bool, whether this LayerNorm, Softmax or Linear may be fused; None is yes.
        strict: raise when nothing is fused, instead of warning.

    Returns:
        A FuseReport. print(report) shows it as a table; `with fuse(model):` undoes it at the end of the block.

    Raises:
        TypeError: model is no nn.Module, or filter_fn is not callable.
        ValueError: an unknown name in ops.
        RuntimeError: strict, and nothing was fused.
    """
    wanted = _check(model, ops, filter_fn)
    changed: list[nn.Module] = []
    found: dict[str, Candidate] = {}
    try:
        _whole_modules(model, wanted, filter_fn, found, changed)
        _linears(model, wanted, filter_fn, found, changed)
    except BaseException:  # filter_fn is the caller's code: leave no half-fused model behind
        for module in changed:
            restore(module)
        raise
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report = FuseReport(model, sorted(found.values(), key=lambda c: order.get(c.name, len(order))), changed)
    if not report.fused:
        message = f"fuse: nothing was fused in {type(model).__name__}\n{report}"
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)
    return report


def unfuse(model: nn.Module) -> int:
    """Undo every fuse of this model, in place; returns how many modules were changed back."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model: got {type(model).__name__}, allowed: a torch.nn.Module")
    return sum(restore(module) for module in model.modules())


def _check(model: nn.Module, ops: Iterable[str] | None, filter_fn: FilterFn | None) -> set[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model: got {type(model).__name__}, allowed: a torch.nn.Module")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"fuse: filter_fn: got {type(filter_fn).__name__}, allowed: a function (name, module) -> bool, or None")
    if isinstance(ops, str):
        raise TypeError(f"fuse: ops: got the string {ops!r}, allowed: a collection of names, such as [{ops!r}]")
    wanted = set(OPS if ops is None else ops)
    if unknown := wanted - {*OPS, *OPTIONAL_OPS}:
        allowed = ", ".join(repr(op) for op in (*OPS, *OPTIONAL_OPS))
        raise ValueError(f"fuse: ops: got {', '.join(sorted(repr(op) for op in unknown))}, allowed: {allowed}")
    return wanted


def _left_out(op: str, name: str, module: nn.Module, wanted: set[str], filter_fn: FilterFn | None) -> str | None:
    if op not in wanted:
        return f'"{op.removeprefix("bare_")}" is not in ops'
    if filter_fn is not None and not filter_fn(name, module):
        return "left out by filter_fn"
    return None


def _whole_modules(
    model: nn.Module, wanted: set[str], filter_fn: FilterFn | None, found: dict[str, Candidate], changed: list[nn.Module]
) -> None:
    """Replace the modules that have a fused class of their own."""
    for name, module in list(model.named_modules()):
        base = next((cls for cls in WHOLE if isinstance(module, cls)), None)
        if base is None:
            if "RMSNorm" in type(module).__name__ or type(module).__name__ == "T5LayerNorm":
                why = f"{type(module).__name__} is no torch.nn.RMSNorm"
                found[name] = Candidate(name, type(module).__name__, "rms_norm", LEFT, why)
            continue
        whole, before = WHOLE[base], type(module).__name__
        if whole.cls is not None and type(module) is whole.cls:
            found[name] = Candidate(name, before, whole.op, ALREADY, f"is a {before}")
            continue
        reason = _left_out(whole.op, name, module, wanted, filter_fn) or _unfit(module, base, whole)
        if reason is None and whole.cls is not None:
            swap(module, whole.cls)
            changed.append(module)
            found[name] = Candidate(name, before, whole.op, FUSED, f"{whole.cls.__name__}{_note(module)}")
        else:
            found[name] = Candidate(name, before, whole.op, LEFT, str(reason))


def _unfit(module: nn.Module, base: type[nn.Module], whole: Whole) -> str | None:
    if whole.cls is None:
        return f"this version of fused_ops has no op for {base.__name__}"
    if type(module) is not base:
        return conditions.subclass(module, base)
    return conditions.replaced_forward(module) or conditions.parameters(module)


def _note(module: nn.Module) -> str:
    return "; its hooks stay" if conditions.hooks(module) else ""


def _linears(
    model: nn.Module, wanted: set[str], filter_fn: FilterFn | None, found: dict[str, Candidate], changed: list[nn.Module]
) -> None:
    """Fuse Linears with the activations that follow them, parent by parent."""
    fused_classes = tuple(linear_classes().values())
    for name, module in model.named_modules():
        if type(module) in fused_classes:
            activation = module.__dict__.get("activation")
            what = f"is a {type(module).__name__}" + (f" with {activation}" if activation else "")
            found[name] = Candidate(name, type(module).__name__, "linear", ALREADY, what)
        elif (base := any_linear(module)) is not None:
            found[name] = Candidate(name, type(module).__name__, "linear", LEFT, conditions.subclass(module, base))
    parents = parents_of(model)
    held = owners(parents)
    for parent in parents:
        left: dict[str, str] = {}
        for path, linear in parent.linears.items():
            op = "linear" if "linear" in wanted else "bare_linear"
            left_out = _left_out(op, parent.full(path), linear, wanted, filter_fn)
            if left_out is not None:
                left[path] = left_out
        for path, verdict in verdicts_of(parent, left, held).items():
            _one_linear(parent, path, verdict, path not in left, wanted, found, changed)
    if type(model) in linear_classes():
        found[""] = Candidate("", type(model).__name__, "linear", LEFT, f"no activation follows: {ONE_KERNEL}")


def _one_linear(
    parent: Parent, path: str, verdict: Match | str, allowed: bool, wanted: set[str],
    found: dict[str, Candidate], changed: list[nn.Module],
) -> None:  # fmt: skip
    linear, name = parent.linears[path], parent.full(path)
    if name in found and found[name].status == FUSED:
        return
    before, op, status = type(linear).__name__, "linear", LEFT
    if isinstance(verdict, Match) and "linear" in wanted and verdict.site.kind != "call":
        status, detail = FUSED, apply(parent, path, verdict, changed)
    elif "bare_linear" in wanted and allowed and type(linear) is nn.Linear and conditions.parameters(linear) is None:
        swap(linear, linear_classes()[type(linear)], activation=None)
        changed.append(linear)
        op, status, detail = "bare_linear", FUSED, "FusedLinear without activation"
    else:
        detail = describe(verdict) if isinstance(verdict, Match) else verdict
    found[name] = Candidate(name, before, op, status, detail)
