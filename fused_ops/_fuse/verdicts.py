"""What the sites of one module come to: which of them a fused call can stand for, and why not the others."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import nn

from . import conditions
from .activations import activation_of, looks_like_activation
from .calls import is_linear, op_of_function
from .chains import fusable
from .flow import Flow
from .resolve import Scope
from .sites import Applied, Site

Refuse = Callable[[Any], "str | None"]  # why the caller wants a module left alone


@dataclass
class Verdict:
    """site's op with what it stands for, or the reason why it stays.

    linears: the Linears of each call of the site, in the fused function's order: a loop's site has several. activation: its
    name, of the first call.
    """

    site: Site
    op: str
    linears: list[tuple[nn.Module, ...]] = field(default_factory=list)
    activation: str = ""
    where: str = ""
    reason: str | None = None


def verdict(site: Site, scope: Scope, flow: Flow, refused: Refuse) -> Verdict | None:
    """What the site comes to, or None where it is no site: its names do not stand for Linears and activations."""
    if site.called is not None:
        return _function(site, scope)
    if site.op == "chain":
        return _chain(site, scope, refused)
    assert site.activation is not None
    linears = [list(scope.objects(linear)) for linear in site.linears]
    if any(not found or not all(map(_may_be_linear, found)) for found in linears):
        return None
    if not all(_may_stand_between(step, scope) for step in site.steps):
        return None
    activations = _activations(site.activation, scope)
    if not activations or not all(map(looks_like_activation, activations)):
        return None
    length = max(map(len, linears))
    every = [*linears, activations]
    if any(len(found) not in (1, length) for found in every):
        every = [found * length if len(found) == 1 else found for found in every]
        if len({len(found) for found in every}) > 1:
            return Verdict(site, site.op, reason="which Linear goes with which activation is not known")
    rows = [tuple(found[i if len(found) > 1 else 0] for found in every) for i in range(length)]
    result = Verdict(site, site.op, [row[:-1] for row in rows], where=spelled(site.activation.called))
    result.reason = next((r for row in rows if (r := _reason(site, row, scope, refused, result)) is not None), None)
    return result


def _chain(site: Site, scope: Scope, refused: Refuse) -> Verdict | None:
    """A loop over modules, by which neighbours may be fused."""
    modules = scope.elements(site.inputs[0])
    if not modules or not all(isinstance(m, nn.Module) for m in modules):
        return None
    linears = [m for m in modules if is_linear(m)]
    result = Verdict(site, "chain", [tuple(modules)], where=spelled(site.inputs[0]))
    if not any(fusable(modules, place, ()) for place in range(len(modules))):
        result.reason = "no Linear of the loop is followed by an activation"
    else:
        result.reason = next((r for m in linears if (r := refused(m)) is not None), None)
    return result


def _reason(site: Site, row: tuple[Any, ...], scope: Scope, refused: Refuse, result: Verdict) -> str | None:
    *linears, activation = row
    assert site.activation is not None
    for linear in linears:
        if (reason := refused(linear) or unfit(linear)) is not None:
            return reason
    given = _given(site.activation, scope)
    if given is None:
        return f"an option of its activation {spelled(site.activation.called)} is not known"
    if (reason := unfit_activation(activation, spelled(site.activation.called), *given)) is not None:
        return reason
    result.activation = result.activation or activation_of(activation, *given) or ""
    if site.op == "gated_linear":
        return None if _same_inputs(site) and _same_shape(linears) else "its gate and its other half have different inputs"
    return None


def unfit(linear: nn.Module) -> str | None:
    """Why a Linear cannot be part of a fused call."""
    if not is_linear(linear):
        return conditions.subclass(linear, nn.Linear)
    return conditions.hooks(linear) or conditions.replaced_forward(linear) or conditions.parameters(linear)


def unfit_activation(activation: Any, where: str, *given: Any) -> str | None:
    """Why an activation, called with further arguments and options, cannot be part of a fused call."""
    if isinstance(activation, nn.Module):
        reason = conditions.hooks(activation) or conditions.replaced_forward(activation)
        if reason is not None:
            return f"its activation {where} {reason}"
    if activation_of(activation, *given) is None:
        return f"no activation of fused_linear's follows ({described(activation)} does)"
    return None


def _function(site: Site, scope: Scope) -> Verdict | None:
    """A function of torch.nn.functional, or a tensor's softmax."""
    assert site.called is not None
    if site.op == "softmax_method":
        assert isinstance(site.called, ast.Attribute)
        owners = scope.objects(site.called.value)
        return None if owners else Verdict(site, "softmax", where="Tensor.softmax")
    made = isinstance(site.called, ast.Call)
    ops = {_op_of(called, made) for called in scope.objects(site.called)}
    (op,) = ops if len(ops) == 1 else (None,)
    return None if op is None else Verdict(site, op, where=spelled(site.called))


def _op_of(called: Any, made: bool) -> str | None:
    """The op for a function, or for an nn.Softmax that is made on the spot: any other module has a row of its own."""
    if isinstance(called, nn.Module):
        return op_of_function(F.softmax) if made and type(called) is nn.Softmax else None
    return op_of_function(called) if callable(called) else None


def _may_be_linear(found: Any) -> bool:
    return isinstance(found, nn.Module) and (is_linear(found) or isinstance(found, nn.Linear))


def _activations(applied: Applied, scope: Scope) -> list[Any]:
    return [applied.called] if isinstance(applied.called, str) else list(scope.objects(applied.called))


def _given(applied: Applied, scope: Scope) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The activation's further arguments, where they are known."""
    values = [scope.objects(node) for node in (*applied.args, *(k.value for k in applied.keywords))]
    if any(len(found) != 1 for found in values):
        return None
    known = [found[0] for found in values]
    return tuple(known[: len(applied.args)]), dict(zip((str(k.arg) for k in applied.keywords), known[len(applied.args) :]))


def _may_stand_between(step: Applied, scope: Scope) -> bool:
    found = [] if isinstance(step.called, str) else scope.objects(step.called)
    return bool(found) and all(f is F.dropout or isinstance(f, (nn.Dropout, nn.Identity)) for f in found)


def _same_inputs(site: Site) -> bool:
    return ast.dump(site.inputs[0]) == ast.dump(site.inputs[1])


def _same_shape(linears: list[Any]) -> bool:
    one, other = linears
    return type(one) is type(other) and one.weight.shape == other.weight.shape


def spelled(node: ast.expr | str) -> str:
    """An expression as its source has it, without `self.`."""
    return node if isinstance(node, str) else ast.unparse(node).removeprefix("self.")


def described(called: Any) -> str:
    return type(called).__name__ if isinstance(called, nn.Module) else str(getattr(called, "__name__", called))


def follower(flow: Flow, call: ast.expr, scope: Scope) -> str:
    """What is done with the result of a call, as the report says it."""
    parent = flow.parent[id(call)]
    if isinstance(parent, ast.Call) and call in parent.args and not isinstance(parent.func, ast.Lambda):
        found = scope.objects(parent.func)
        return f"no activation follows ({described(found[0]) if found else spelled(parent.func)} does)"
    if isinstance(parent, ast.Attribute):
        return f"no activation follows ({parent.attr} does)"
    if isinstance(parent, ast.BinOp):
        return f"no activation follows ({type(parent.op).__name__.lower().removesuffix('ition')} does)"
    if isinstance(parent, ast.Return):
        return f"no activation follows (the return of {scope.source.function.__qualname__.split('.')[0]} does)"
    if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
        return _follower_of_variable(flow, parent, parent.targets[0].id, scope)
    return "no activation follows at once"


def _follower_of_variable(flow: Flow, statement: ast.Assign, name: str, scope: Scope) -> str:
    block, place = flow.block[id(statement)]
    for later in block[place + 1 :]:
        uses = [n for n in ast.walk(later) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
        if not uses:
            continue
        found = flow.definition(uses[0])
        if found is not None and found.statement is statement:
            return follower(flow, uses[0], scope)
        return f"its output, {name}, is used in more than one place, or a branch lies between"
    return "no activation follows at once"
