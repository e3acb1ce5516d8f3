"""RMS norm: fused_rmsnorm, its raw operators, and its SPEC."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._runtime.tuned_kernels import Tuned
from ..._torch.autograd import differentiable_backward, needed_gradients, needs_grad, runs_aten
from ..._torch.eager import fast_applies, fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Backward, Op, Roles
from .arguments import cast_all, checked, dims_of, fits, number, over_rows, tracing
from .cases import rms_norm as cases
from .rms_norm_launch import infer_launch, rms_norm_bwd_launch, rms_norm_launch
from .rms_norm_onnx import rms_norm_onnx
from .rms_norm_reference import (
    eps_of,
    rms_norm_bwd_reference,
    rms_norm_eager,
    rms_norm_formula,
    rms_norm_reference,
    rms_norm_rows,
    wide_rms_norm,
)


def _forward(run: Any, ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y, rstd = run(x, weight, eps)
    ctx.save_for_backward(x, weight, rstd)
    ctx.eps = eps
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return _forward(_FWD, ctx, x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_backward(rms_norm_rows, (x, weight, ctx.eps), dy)[:2], None
        need_dx, need_dw, _ = needed_gradients(ctx)
        dx, dw = _BWD(dy, x, weight, rstd, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None


def fused_rmsnorm(
    input: Tensor, normalized_shape: list[int], weight: Optional[Tensor] = None, eps: Optional[float] = None
) -> Tensor:
    """Root mean square normalisation over the last dimensions, as torch.nn.functional.rms_norm, in one fused kernel.

    y = x / sqrt(mean(x^2) + eps) * weight, the mean over the trailing normalized_shape.

    Args:
        input: (*, *normalized_shape), float32, float16, bfloat16 or float64, any strides.
        normalized_shape: the trailing dimensions to normalise over; a list or tuple of ints, or one int.
        weight: of shape normalized_shape, or None; of any of these dtypes, whatever input's is.
        eps: added to the mean of squares, a number; None for torch's default, 2^-23 (2^-52 for float64 input).

    Returns:
        A contiguous tensor of input's shape and dtype. Under CUDA autocast, input and weight are cast to float32, but for what is
        float64, and the result is float32 (float64 for float64 input), as torch's.

    Raises:
        RuntimeError: a shape that does not fit, tensors on different devices.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    Computed in fp32 (fp64 for float64 input) whatever weight's dtype, and rounded once. Gradients for input and weight, each in
    its tensor's dtype and only when needed, the same bits on every run; differentiable any number of times.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.

    Where a tensor is nested, or of another library's subclass, torch.nn.functional computes, or refuses it.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return rms_norm_eager(input, normalized_shape, weight, eps)
    else:
        return _fused_rmsnorm(input, normalized_shape, weight, eps)


def _fused_rmsnorm(input: Tensor, normalized_shape: Union[int, list[int]], weight: Tensor | None, eps: float | None) -> Tensor:
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else dims_of(normalized_shape)
    way = fast_path(input, weight)
    if way and (eps is None or type(eps) is float) and fits(input, shape, weight):
        if way == "cuda" or (way == "aten" and (weight is None or weight.dtype is input.dtype)):
            return _INFER[way](input, shape, weight, eps)
        if way != "aten":
            return _APPLY[way](input, weight, eps_of(input, eps))
    if overrides(input, weight):
        return overridden(SPEC, (input, weight), input, shape, weight, eps)
    shape = checked("fused_rmsnorm", input, shape, weight=weight)
    eps = None if eps is None else number("fused_rmsnorm", eps)
    if runs_aten("rms_norm"):
        return (rms_norm_eager if tracing() else wide_rms_norm)(input, shape, weight, eps)  # type: ignore[arg-type]
    input, (weight,) = cast_all(input, weight)
    epsilon = eps_of(input, eps)

    def rows(x: Tensor, weight: Tensor | None) -> Tensor:
        if needs_grad(x, weight):
            return _RMSNorm.apply(x, weight, epsilon)
        return _FWD(x, weight, epsilon)[0]

    return over_rows(rows, input, shape, weight)


SPEC = define(
    Op(
        name="rms_norm",
        public=fused_rmsnorm,
        torch_fn=F.rms_norm,
        schema="(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)",
        reference=rms_norm_reference,
        launch=rms_norm_launch,
        bound=cases.fwd_bound,
        roles=Roles("x v -", "x s"),
        backward=Backward(
            schema=("(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)"),
            reference=rms_norm_bwd_reference,
            launch=rms_norm_bwd_launch,
            bound=cases.bwd_bound,
            roles=Roles("x x v s - -", "x4 v5"),
            tuned=Tuned(("norm/rms_norm", "norm/norm_bwd_wide"), ("one_pass", "chunked"), chunk_rows=(1, 2, 4)),
        ),
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
        onnx=rms_norm_onnx,
        module=nn.RMSNorm,
        tuned=Tuned(("norm/rms_norm", "norm/norm_bwd_wide"), ("one_pass", "chunked")),
        formula=rms_norm_formula,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_INFER = implementations("rms_norm_fwd", torch.rms_norm, infer_launch)
_APPLY = fast_applies(_RMSNorm, _forward, implementations("rms_norm_fwd", rms_norm_reference, rms_norm_launch))
