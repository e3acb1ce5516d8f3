"""What modules called one after the other come to: a Sequential's children, or a list that a forward loops over."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import conditions
from .activations import activation_of, looks_like_activation
from .calls import is_linear
from .chains import second_half
from .report import ALREADY, FUSED, LEFT
from .run import Run
from .sequential import FusedSequential
from .sites import PARTS
from .swap import original_class
from .verdicts import described, unfit, unfit_activation


def is_sequential(cls: type[nn.Module]) -> bool:
    """Whether a class calls its children one after the other, as torch's Sequential does."""
    return issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__


def sequential(run: Run, name: str, module: nn.Module) -> tuple[Any, dict[str, Any]]:
    """(the class to mix in, or None; its attributes)."""
    children = tuple(module._modules.values())
    earlier: frozenset[str] = module.__dict__.get("_fuse_ops", frozenset())
    ops = (PARTS & run.wanted) | earlier
    left = refused(run, children)
    if not neighbours(run, name, original_class(module).__name__, children, ops, earlier, conditions.replaced_forward(module)):
        return None, {}
    known = {"_fuse_left": left} if left or "_fuse_left" in module.__dict__ else {}
    return FusedSequential, {"_fuse_ops": ops, **known}


def refused(run: Run, children: tuple[Any, ...]) -> tuple[nn.Module, ...]:
    """The Linears among children that filter_fn refuses."""
    return tuple(child for child in children if child is not None and is_linear(child) and run.refuses(child) is not None)


def neighbours(
    run: Run, name: str, holder: str, children: tuple[Any, ...], ops: frozenset[str], earlier: frozenset[str],
    unfit_holder: str | None = None,
) -> bool:  # fmt: skip
    """Enter the rows of the Linears among children. Returns whether anything is fused. earlier: by a fuse before this one."""
    left = refused(run, children)
    fused = False
    for place, linear in enumerate(children):
        if linear is None or not (is_linear(linear) or isinstance(linear, nn.Linear)):
            continue
        following = children[place + 1] if place + 1 < len(children) else None
        if following is None or not looks_like_activation(following):
            after = f"the end of {holder}" if following is None else described(following)
            run.follows.setdefault(id(linear), f"no activation follows ({after} does)")
            continue
        reason = (
            unfit_holder
            or run.refuses(linear)
            or unfit(linear)
            or unfit_activation(following, run.names.get(id(following), "").rpartition(".")[2])
        )
        if reason is None and not ops:
            reason = '"linear" is not in ops'
        path, cls = run.names.get(id(linear), ""), type(linear).__name__
        if reason is not None or "linear" not in ops:
            run.record(path, cls, "linear", LEFT, reason or '"linear" is not in ops', 1)
        else:
            what = f"with {activation_of(following)} ({described(following)})"
            run.record(path, cls, "linear", ALREADY if "linear" in earlier else FUSED, what, 1)
            fused = True
        if reason is not None:
            continue
        run.used.add(id(linear))
        end = second_half(children, place, left)
        if end is not None and "mlp" in ops:
            keys = [run.names.get(id(part), "").removeprefix(f"{name}." if name else "") for part in (linear, children[end])]
            detail = f"{' and '.join(keys)} with {activation_of(following)}, in training only"
            status = ALREADY if "mlp" in earlier else FUSED
            run.record(name, holder, "mlp", status, detail, key=path if run.has(name, "mlp") else "")
            fused = True
    return fused
