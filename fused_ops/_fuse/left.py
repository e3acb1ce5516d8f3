"""What a module holds that fuse has no op for: the report's rows for activations by themselves, packed gates, experts, residual norms."""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from .._torch.spec import REGISTRY
from .activations import looks_like_activation
from .blocks import Block, Method
from .branches import is_taken
from .calls import is_linear
from .flow import Flow
from .norm_formula import norm_formula
from .report import LEFT
from .resolve import Scope
from .run import Run
from .sites import applied_at, is_path
from .swap import original_class
from .verdicts import described, spelled

_SPLITS = frozenset(("chunk", "split", "unbind", "tensor_split"))
_PRODUCTS = frozenset(("linear", "matmul", "bmm", "grouped_mm", "_grouped_mm", "einsum", "baddbmm"))
_OTHER_SOFTMAX = frozenset(("log_softmax", "gumbel_softmax", "softmin", "sparsemax"))
_OTHER_NORMS = frozenset(("group_norm", "batch_norm", "instance_norm", "local_response_norm"))
_MODULES = {
    nn.GroupNorm: "norm", nn.modules.batchnorm._NormBase: "norm", nn.LocalResponseNorm: "norm",
    nn.MultiheadAttention: "softmax",
    nn.LogSoftmax: "softmax of another kind", nn.Softmin: "softmax of another kind", nn.Softmax2d: "softmax of another kind",
}  # fmt: skip
GATE = "gated_linear"
NO_PACKED = "a packed gate (one Linear holds both halves): fused_ops has no op for that yet; two Linears would fuse"


def left(run: Run, found: Block) -> None:
    """Enter the rows of what the module's methods compute and no op replaces."""
    _module(run, found)
    for method in found.methods:
        flow, scope = method.parsed.flow, method.scope
        taken = {id(v.site.root) for v in method.verdicts} | {node for v in method.verdicts for node in v.site.nodes}
        for place, node in enumerate(ast.walk(flow.tree)):
            if not isinstance(node, ast.Call):
                continue
            key = f"{method.name} {place}"
            if id(node) not in taken and is_taken(flow, scope, node):
                _activation(run, found, method, node, key)
            _residual(run, found, flow, scope, node)
            _function(run, found, scope, node, key)


def _module(run: Run, found: Block) -> None:
    cls = original_class(found.module)
    kind = next((kind for known, kind in _MODULES.items() if isinstance(found.module, known)), None)
    if kind is not None:
        reason = f"fused_ops has no op for {cls.__name__}"
        if kind in REGISTRY:
            reason = f"inside {cls.__name__}, which torch computes in one function"
        run.record(found.name, cls.__name__, kind, LEFT, reason)
    stacked = [name for name, p in found.module._parameters.items() if p is not None and _is_stack(p)]
    names = {name for method in found.methods for name in _names(method.parsed.flow.tree)}
    if stacked and names & _PRODUCTS and _applies_activation(found):
        reason = f"experts with 3-D weights ({', '.join(stacked)}): fused_ops has no product over experts yet"
        run.record(found.name, cls.__name__, GATE, LEFT, reason, 1, "experts")
        run.record(found.name, cls.__name__, "linear", LEFT, reason, 1, "experts")


def _is_stack(parameter: Any) -> bool:
    """Whether a parameter is a stack of matrices."""
    if isinstance(parameter, nn.UninitializedParameter):
        return False
    return parameter.dim() == 3 and min(parameter.shape) > 1


def _names(tree: ast.AST) -> set[str]:
    return {
        n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(tree) if isinstance(n, (ast.Attribute, ast.Name))
    }


def _applies_activation(found: Block) -> bool:
    return any(
        looks_like_activation(called)
        for method in found.methods
        for node in ast.walk(method.parsed.flow.tree)
        if isinstance(node, ast.Call) and is_path(node.func)
        for called in method.scope.objects(node.func)
    )


def _activation(run: Run, found: Block, method: Method, node: ast.Call, key: str) -> None:
    """An activation that no Linear is seen to precede."""
    applied = applied_at(node)
    if applied is None:
        return
    called: tuple[Any, ...] = (applied.called,) if isinstance(applied.called, str) else method.scope.objects(applied.called)
    if not called or not all(map(looks_like_activation, called)):
        return
    holder = original_class(found.module).__name__
    if any(p is not None and _is_stack(p) for p in found.module._parameters.values()):
        return  # experts, which have a row
    split = _split(method.parsed.flow, applied.inner)
    if split is not None:
        linear = _linear_of(method, split)
        run.record(found.name, holder, GATE, LEFT, NO_PACKED, found.counts(method, node), key)
        if linear is not None:
            run.record(
                run.names.get(id(linear), ""), type(linear).__name__, "linear", LEFT, NO_PACKED, found.counts(method, node)
            )
        return
    path = run.names.get(id(called[0]), found.name) if isinstance(called[0], nn.Module) else found.name
    detail = (
        f"{described(called[0])} of {_source(method, applied.inner)} in {holder}.{method.name}: no Linear is seen before it"
    )
    run.record(path, described(called[0]), "activation", LEFT, detail, 0, key)


def _source(method: Method, inner: ast.expr) -> str:
    """What an activation is applied to, as the report says it."""
    value = method.parsed.flow.last_value(inner)
    if isinstance(value, ast.Call):
        called = method.scope.objects(value.func)
        return f"{described(called[0]) if called else spelled(value.func)}'s output"
    return {ast.BinOp: "a sum or product", ast.Name: "a variable", ast.Subscript: "a part of a tensor"}.get(
        type(value), "an expression"
    )


def _split(flow: Flow, inner: ast.expr) -> ast.Call | None:
    """The call that splits a tensor in parts, one of which inner is."""
    if isinstance(inner, ast.Subscript):
        inner = inner.value
    value = flow.last_value(inner)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _SPLITS:
        return value
    return None


def _linear_of(method: Method, split: ast.Call) -> nn.Module | None:
    """The Linear whose output is split."""
    assert isinstance(split.func, ast.Attribute)
    tensor = (
        split.args[0]
        if split.args and isinstance(split.func.value, ast.Name) and split.func.value.id == "torch"
        else split.func.value
    )
    value = method.parsed.flow.last_value(tensor)
    called = method.scope.objects(value.func) if isinstance(value, ast.Call) else ()
    return called[0] if called and is_linear(called[0]) else None


def _residual(run: Run, found: Block, flow: Flow, scope: Scope, node: ast.Call) -> None:
    """A norm of a sum of two tensors."""
    if len(node.args) != 1 or not is_path(node.func):
        return
    value = flow.last_value(node.args[0])
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add) or isinstance(value.right, ast.Constant):
        return
    for called in scope.objects(node.func):
        if isinstance(called, nn.Module) and _is_norm(called):
            name = run.names.get(id(called), "")
            detail = f"{spelled(node.func)} of a sum in {original_class(found.module).__name__}: fused_ops has no add and norm in one yet"
            run.record(name, original_class(called).__name__, "add_norm", LEFT, detail)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or norm_formula(module) is not None


def _function(run: Run, found: Block, scope: Scope, node: ast.Call, key: str) -> None:
    """A softmax or a norm of a kind that no op computes, called as a function or a method."""
    if not isinstance(node.func, (ast.Attribute, ast.Name)):
        return
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
    kind = "softmax of another kind" if name in _OTHER_SOFTMAX else "norm" if name in _OTHER_NORMS else None
    called = scope.objects(node.func)
    if kind is not None and not any(isinstance(c, nn.Module) for c in called):
        holder = original_class(found.module).__name__
        run.record(found.name, holder, kind, LEFT, f"{spelled(node.func)}: fused_ops has no op for it yet", 0, key)
