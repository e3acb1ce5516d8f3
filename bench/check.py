"""Whether a provider computes the right thing: held to the fp64 reference on the same inputs before it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import Arguments, call_on, outputs
from .tasks import Task

LIMITS = {torch.bfloat16: 0.04, torch.float16: 5e-3, torch.float32: 2e-4, torch.float8_e4m3fn: 0.04}
"""The largest |out - ref| / (|ref| + rms of ref's row) that counts as the same function, by the case's dtype: ten times rounding.

An fp8 case's operands are exact and its output is bf16, so its limit is that of bf16. An output that is itself e4m3 has
FP8_OUTPUT instead: fp32 rounding moves a value near the middle between two numbers to the other, one step of e4m3 away.

Wide enough for a peer that accumulates in half precision, too narrow for a missing bias, a row left out, or a zero.
"""
FP8_OUTPUT = 0.1  # a step is at most 32 at 448, and 2^-3 of a number
CHUNK = 1 << 26  # elements computed in fp64 at once


@dataclass(frozen=True)
class Verdict:
    """error: the largest relative error over all results; what: the result it is in; right: within limit."""

    error: float
    limit: float
    what: str

    @property
    def right(self) -> bool:
        return self.error <= self.limit

    def reason(self) -> str:
        return "" if self.right else f"{self.what}: relative error {self.error:.3g}, allowed {self.limit:.3g}"


def expected(task: Task, arguments: Arguments) -> list[Tensor]:
    """The outputs, or for the passes that go backward the gradients after them, computed in fp64 and kept in fp32.

    linear_fp8's torch_fn itself multiplies in fp32 and rounds its output to bf16; its limit leaves room for both.

    Ops without a product are computed a block of rows at a time, so that the fp64 copies of a large case fit in memory.
    """
    tensors = [a for a in (*arguments.args, *arguments.kwargs.values()) if isinstance(a, Tensor)]
    x = tensors[0]
    if task.is_matmul or x.numel() <= CHUNK or x.dim() < 2:
        return _in_fp64(task, arguments)
    by_row = [t.shape == x.shape for t in tensors]
    rows = max(1, CHUNK * x.shape[0] // x.numel())
    total: list[Tensor] = []
    for start in range(0, x.shape[0], rows):
        part = _rows(arguments, x.shape, slice(start, start + rows))
        results = _in_fp64(task, part)
        split = [True] * (len(results) - len(by_row)) + by_row if task.pass_ in ("bwd", "fwd+bwd") else [True] * len(results)
        if not total:
            total = [r.new_empty((x.shape[0], *r.shape[1:])) if s else torch.zeros_like(r) for r, s in zip(results, split)]
        for whole, result, s in zip(total, results, split):
            if s:
                whole[start : start + rows] = result
            else:
                whole += result
    return total


def _rows(arguments: Arguments, shape: torch.Size, part: slice) -> Arguments:
    def cut(value: Any) -> Any:
        return (
            value.detach()[part].requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and value.shape == shape
            else value
        )

    return Arguments(
        tuple(cut(a) for a in arguments.args),
        {k: cut(v) for k, v in arguments.kwargs.items()},
        tuple(d[part] for d in arguments.dy),
    )


def _in_fp64(task: Task, arguments: Arguments) -> list[Tensor]:
    leaves: list[Tensor] = []

    def widen(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        wide = t.detach().double()
        if t.requires_grad:
            leaves.append(wide.requires_grad_())
        return wide

    with torch.set_grad_enabled(task.pass_ in ("bwd", "fwd+bwd")):
        out = outputs(call_on(task.spec.torch_fn, widen, arguments.args, arguments.kwargs))
        grads = torch.autograd.grad(out, leaves, [d.double() for d in arguments.dy]) if arguments.dy else ()
    results = grads if task.pass_ == "bwd" else (*out, *grads)
    return [r.detach().float() for r in results]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """The largest |out - ref| / (|ref| + rms of its row); inf for another shape, or a NaN or infinity out of place."""
    if out.shape != ref.shape:
        return float("inf")
    if out.numel() == 0:
        return 0.0
    out2, ref2 = (t.detach().reshape(-1, t.shape[-1]) if t.dim() else t.detach().reshape(1, 1) for t in (out, ref))
    rows = max(1, CHUNK // out2.shape[1])
    worst = torch.zeros((), device=out.device)
    for start in range(0, out2.shape[0], rows):
        o, r = out2[start : start + rows].float(), ref2[start : start + rows].float()
        size = r.abs() + r.square().mean(-1, keepdim=True).sqrt()
        error = torch.where(o == r, 0.0, (o - r).abs() / size)
        worst = torch.maximum(worst, error.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
    return float(worst)


def verdict(task: Task, results: list[Tensor], reference: list[Tensor]) -> Verdict:
    """Hold results to reference, both as expected() orders them."""
    limit = FP8_OUTPUT if any(r.dtype is torch.float8_e4m3fn for r in results) else LIMITS[task.case.dtype]
    if len(results) != len(reference):
        return Verdict(float("inf"), limit, f"{len(results)} results instead of {len(reference)}")
    errors = [relative_error(out, ref) for out, ref in zip(results, reference)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    return Verdict(errors[worst], limit, f"result {worst} of {len(errors)} ({task.pass_})")
