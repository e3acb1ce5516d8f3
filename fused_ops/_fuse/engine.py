"""fuse(model) and unfuse(model)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from .plan import plan
from .report import FuseReport
from .run import FilterFn, Run
from .sites import FORMS
from .swap import restore_all
from .whole import WHOLE

OPS = (*(whole.op for whole in WHOLE.values()), *reversed(FORMS))
OPTIONAL_OPS = ("bare_linear",)


def fuse(
    model: nn.Module, ops: Iterable[str] | None = None, filter_fn: FilterFn | None = None, strict: bool = False
) -> FuseReport:
    """Make a model compute with fused kernels, in place, and say for every candidate what was done or why not.

    What fuses is the source of a forward: the module that calls a Linear and an activation on its output calls one
    fused_linear there, whether they are modules, functions, methods, one statement or several; gates, whole MLPs (in
    training), and F.softmax, F.layer_norm and F.rms_norm alike. nn.LayerNorm, nn.RMSNorm, nn.Softmax and norms that compute
    the same become fused_ops.nn's modules. The source is only read, and nothing of the model is run.

    Each call decides anew: where a Linear or an activation has since been replaced, hooked, quantised or wrapped (by LoRA, say),
    the expression is computed as written. So every child stays what it is, for whoever calls it, and may be changed later.
    Parameters, state_dict keys, hooks, devices, weight tying, class names, pickling and deepcopy stay as they are. Calling it
    again changes nothing more; unfuse(model) takes all of it back. Modules of one structure share one function, so that
    compiling a model layer by layer makes one graph for all its layers.

    Args:
        model: any nn.Module. Fuse before FSDP or tensor parallelism. PEFT adapters may come before or after: a Linear that
            carries one is called as it is, so fuse after merging them to have it fused. Quantise by replacing modules or
            weights before or after; unfuse before quantising an exported graph (PT2E), whose patterns know ATen's operators.
        ops: which of "layer_norm", "rms_norm", "softmax", "linear" (with its activation), "gated_linear" and "mlp" to
            fuse; None is all of them. "bare_linear" (a Linear without activation) only when named: it already is one kernel.
        filter_fn: filter_fn(name, module) -> bool, whether this LayerNorm, RMSNorm, Softmax or Linear, or what this module's
            forward calls as a function, may be fused; None is yes.
        strict: raise when nothing is fused, instead of warning.

    Returns:
        A FuseReport. print(report) shows it as a table; `with fuse(model):` undoes it at the end of the block.

    Raises:
        TypeError: model is no nn.Module, or filter_fn is not callable.
        ValueError: an unknown name in ops.
        RuntimeError: strict, and nothing was fused.
    """
    run = Run(model, _check(model, ops, filter_fn), filter_fn)
    plan(run)
    run.apply()
    report = FuseReport(model, run.candidates(), run.changed, run.number)
    if not report.fused:
        message = f"fuse: nothing was fused in {type(model).__name__}\n{report}"
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)
    return report


def unfuse(model: nn.Module) -> int:
    """Undo every fuse of this model, in place; returns how many modules were changed back.

    Raises:
        TypeError: model is no nn.Module.
        RuntimeError: something else (a parametrisation of a norm, fully_shard, accelerate's hooks) has changed a module that
            fuse changed, since then; the message names it, and nothing is undone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model: got {type(model).__name__}, allowed: a torch.nn.Module")
    return restore_all(model.named_modules())


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
