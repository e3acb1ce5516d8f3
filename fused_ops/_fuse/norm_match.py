"""The formulas of norms among the nodes of a symbolic run: fused_rmsnorm's own, and why another one is not it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .norm_symbols import Node, Run

_F32, _BF16, _F64 = torch.float32, torch.bfloat16, torch.float64
_MEANS = ("mean", "mean()")
_SQUARE_SUMS = ("sum", "norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "normalize")
_SPREADS = ("var", "std")
_IN_LOW = "does not compute in fp32: cast the input up before the squares, and the result down at the end"


@dataclass(frozen=True)
class Rms:
    """input * rsqrt(mean(input^2) + eps), the root spelled as `root`, times the parameter `weight` if any."""

    input: Node
    eps: Any
    root: str
    weight: str | None = None


def e_form(run: Run) -> Rms | None:
    """run as fused_rmsnorm computes it: all in fp32 (fp64 for fp64), one rounding at the end. None where it is anything else."""
    wide = _F64 if run.x.dtype is _F64 else _F32
    y = run.out
    if wide is not run.x.dtype:
        if y.op != "cast" or y.dtype is not run.x.dtype:
            return None
        y = y.args[0]
    found = _weighted(y) if y.dtype is wide else None
    return found if found is not None and found.input is run.cast(run.x, wide) else None


def _weighted(y: Node) -> Rms | None:
    found = _normalised(y)
    for h, w in () if found is not None else _factors(y):
        name, inner = _parameter(w), _normalised(h)
        if name is not None and inner is not None:
            return Rms(inner.input, inner.eps, inner.root, name)
    return found


def _normalised(y: Any) -> Rms | None:
    for x, factor in _factors(y):
        root, inner = _reciprocal_root(factor)
        if inner is not None and (eps := _eps(inner, x)) is not None:
            return Rms(x, eps, root)
    if isinstance(y, Node) and y.op == "div":
        root, inner = _root(y.args[1])
        if inner is not None and (eps := _eps(inner, y.args[0])) is not None:
            return Rms(y.args[0], eps, f"x/{root}")
    return None


def _factors(y: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(y, Node) and y.op == "mul":
        yield y.args
        yield y.args[::-1]


def _reciprocal_root(node: Any) -> tuple[str, Node | None]:
    """(its spelling, v) of a node that is 1 / sqrt(v)."""
    if not isinstance(node, Node):
        return "", None
    if node.op == "rsqrt":
        return "rsqrt", node.args[0]
    if node.op == "pow" and _is_number(node.args[1], -0.5):
        return "pow", node.args[0]
    if node.op == "reciprocal":
        root, inner = _root(node.args[0])
        return f"1/{root}", inner
    if node.op == "div" and _is_number(node.args[0], 1):
        root, inner = _root(node.args[1])
        return f"1/{root}", inner
    return "", None


def _root(node: Any) -> tuple[str, Node | None]:
    if isinstance(node, Node) and node.op == "sqrt":
        return "sqrt", node.args[0]
    if isinstance(node, Node) and node.op == "pow" and _is_number(node.args[1], 0.5):
        return "pow", node.args[0]
    return "", None


def _eps(node: Any, x: Any) -> Any:
    """The eps of mean(x^2) + eps, or None where node is anything else."""
    if not (isinstance(node, Node) and node.op == "add"):
        return None
    for mean, eps in (node.args, node.args[::-1]):
        if isinstance(mean, Node) and mean.op == "mean" and isinstance(eps, (int, float)) and not isinstance(eps, bool):
            square = mean.args[0]
            if square.op == "square" and square.args[0] is x:
                return eps
    return None


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and bool(value == number)


def _parameter(node: Any) -> str | None:
    if isinstance(node, Node) and node.op == "cast":
        node = node.args[0]
    return node.args[0] if isinstance(node, Node) and node.op == "parameter" else None


def reason(one: Run, half: Run, mixed: Run) -> str:
    """Why the norm is not fused_rmsnorm, from runs in (input, weight) fp32 and fp32, bf16 and bf16, bf16 and fp32."""
    if e_form(one) is not None:
        return _rounding(half, mixed)
    nodes = list(_below(one.out))
    ops = {node.op for node in nodes}
    if any(node.op == "sub" and _is_mean_of(node.args[1], node.args[0]) for node in nodes):
        return "a layer norm written by hand (a mean is subtracted): fuse knows F.layer_norm, called as such"
    if _low(half):
        return _IN_LOW
    if _reciprocal_root(one.out)[1] is not None:
        return "returns the factor 1 / sqrt(mean(x^2) + eps) alone: no fused function does"
    for h, factor in _factors(one.out):
        if _normalised(h) is not None and isinstance(factor, Node) and factor.op == "add" and _adds_one(factor):
            rounded = any(node.op == "add" and _adds_one(node) and node.dtype is _BF16 for node in _below(half.out))
            where = "added in the weight's dtype" if rounded else "added in fp32"
            return f"multiplies by 1 + weight ({where}): fused_rmsnorm has no such offset yet"
    norms = [found for node in nodes if (found := _normalised(node)) is not None]
    if one.out.op == "add" and norms:
        return "adds a bias: fused_rmsnorm has none"
    if any(any(below.op == "parameter" for below in _below(found.input)) for found in norms):
        return "multiplies by the weight before the statistics: fused_rmsnorm does after them"
    return f"its forward is a norm that fuse does not know: {_unknown(ops, bool(norms))}"


def _unknown(ops: set[str], norms: bool) -> str:
    if found := sorted(ops.intersection(_SPREADS)):
        return f"it divides by a spread ({found[0]}), not by the root of a mean of squares"
    if found := sorted(ops.intersection(_SQUARE_SUMS)):
        return f"an L2 norm ({found[0]}): it divides by a sum of squares, not their mean"
    if not ops.intersection(_MEANS):
        return "its statistics are buffers or parameters (a frozen batch norm), not computed from the input"
    if "mean()" in ops:
        return "its mean is not over the last dimension alone with keepdim=True"
    if norms:
        return "it does more than normalise and multiply by a weight"
    return "it is not x * rsqrt(mean(x^2) + eps)"


def _rounding(half: Run, mixed: Run) -> str:
    """What is rounded elsewhere, in a norm that is fused_rmsnorm's in fp32."""
    nodes = list(_below(half.out))
    if _low(half):
        return _IN_LOW
    casts = [node.args[0] for node in nodes if node.op == "cast" and node.dtype is _BF16]
    if any(_reciprocal_root(node)[1] is not None for node in casts):
        return "rounds rstd to the input's dtype before the product: fused_rmsnorm keeps it in fp32"
    if half.out.op == "mul" and any(_normalised(node) is not None for node in casts):
        if not any(node.op == "cast" and node.dtype is _BF16 for node in _below(mixed.out)):
            return "T5's way: rounds before the weight, and its result's dtype depends on the weight's: fused_rmsnorm has no such mode yet"
        return "rounds before the weight (Llama's way): fused_rmsnorm has no such mode yet"
    if half.out.dtype is not half.x.dtype:
        return "its result is not in the input's dtype: fused_rmsnorm's is"
    if half.asked:
        return "its forward is a norm that fuse does not know: it branches on the input's shape or values"
    return "rounds elsewhere than fused_rmsnorm, which computes in fp32 and rounds once at the end"


def _low(run: Run) -> bool:
    """Whether a mean of squares is rounded to run's input dtype."""
    return any(node.op == "mean" and node.args[0].op == "square" and node.dtype is not _F32 for node in _below(run.out))


def _adds_one(node: Node) -> bool:
    return any(_is_number(a, 1) for a in node.args) and any(_parameter(a) is not None for a in node.args)


def _is_mean_of(node: Any, x: Any) -> bool:
    return isinstance(node, Node) and node.op in _MEANS and node.args[0] is x


def _below(node: Node) -> Iterator[Node]:
    """node and all that it is computed from, each once."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending += [a for a in node.args if isinstance(a, Node)]
