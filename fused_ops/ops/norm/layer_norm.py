"""Layer norm: fused_layernorm, its raw operators, and its SPEC."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._runtime.tuned_kernels import Tuned
from ..._torch.arguments import FLOATS
from ..._torch.autograd import differentiable_backward, needed_gradients, needs_grad, runs_aten, transformed
from ..._torch.eager import fast_applies, fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Backward, Op, Roles
from .arguments import cast_all, checked, dims_of, fits, number, over_rows, tracing
from .cases import layer_norm as cases
from .layer_norm_launch import infer_launch, layer_norm_bwd_launch, layer_norm_launch
from .layer_norm_onnx import layer_norm_onnx
from .layer_norm_reference import (
    differentiable_rows,
    layer_norm_bwd_formula,
    layer_norm_bwd_reference,
    layer_norm_eager,
    layer_norm_reference,
    train_reference,
    wide_layer_norm,
)


def _forward(run: Any, ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y, mean, rstd = run(x, weight, bias, eps)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.eps = eps
    return y


_WIDE = frozenset((torch.float32, torch.float64))  # the dtypes in which ATen's derivatives are within the contract


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return _forward(_FWD, ctx, x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_backward(differentiable_rows, (x, weight, bias, ctx.eps), dy)[:3], None
        if mean.dim() == x.dim():
            mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
        need_dx, need_dw, need_db, _ = needed_gradients(ctx)
        bias_dtype = None if bias is None else bias.dtype
        dx, dw, db = _BWD(dy, x, weight, mean, rstd, need_dx, need_dw, need_db, bias_dtype)
        return dx if need_dx else None, dw if need_dw else None, db if need_db else None, None


def fused_layernorm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation over the last dimensions, as torch.nn.functional.layer_norm, in one fused kernel.

    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and biased variance over the trailing normalized_shape.

    Args:
        input: (*, *normalized_shape), float32, float16, bfloat16 or float64, any strides.
        normalized_shape: the trailing dimensions to normalise over; a list or tuple of ints, or one int.
        weight: of shape normalized_shape, or None; of any of these dtypes, whatever input's and bias's are.
        bias: of shape normalized_shape, or None; likewise.
        eps: added to the variance; a number.

    Returns:
        A contiguous tensor of input's shape and dtype. Under CUDA autocast, input, weight and bias are cast to float32, but for
        what is float64, and the result is float32 (float64 for float64 input), as torch's.

    Raises:
        RuntimeError: a shape that does not fit, tensors on different devices.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    Computed in fp32 (fp64 for float64 input) whatever the parameters' dtypes, and rounded once. Gradients for input, weight and
    bias, each in its tensor's dtype and only when needed, the same bits on every run; differentiable any number of times.
    Source: Ba, Kiros, Hinton, Layer Normalization, 2016.

    Where a tensor is nested, or of another library's subclass, torch.nn.functional computes, or refuses it.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return layer_norm_eager(input, normalized_shape, weight, bias, eps)
    else:
        return _fused_layernorm(input, normalized_shape, weight, bias, eps)


def _fused_layernorm(
    input: Tensor, normalized_shape: Union[int, list[int]], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else dims_of(normalized_shape)
    way = fast_path(input, weight, bias)
    if way == "aten":
        dtype = input.dtype
        if dtype in FLOATS and ((dtype in _WIDE and (weight is not None or bias is None)) or not transformed()):
            try:
                return _INFER[way](input, shape, weight, bias, eps)
            except Exception:  # what ATen refuses is refused below, in our words
                pass
    elif way and type(eps) is float and fits(input, shape, weight, bias):
        if way == "cuda":
            return _INFER[way](input, shape, weight, bias, eps)
        return _APPLY[way](input, weight, bias, eps)
    if overrides(input, weight, bias):
        return overridden(SPEC, (input, weight, bias), input, shape, weight, bias, eps)
    shape = checked("fused_layernorm", input, shape, weight=weight, bias=bias)
    eps = number("fused_layernorm", eps)
    if runs_aten("layer_norm"):
        return (layer_norm_eager if tracing() else wide_layer_norm)(input, shape, weight, bias, eps)  # type: ignore[arg-type]
    input, (weight, bias) = cast_all(input, weight, bias)

    def rows(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if needs_grad(x, weight, bias):
            return _LayerNorm.apply(x, weight, bias, eps)
        return _FWD(x, weight, bias, eps)[0]

    return over_rows(rows, input, shape, weight, bias)


SPEC = define(
    Op(
        name="layer_norm",
        public=fused_layernorm,
        torch_fn=F.layer_norm,
        schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
        reference=layer_norm_reference,
        launch=layer_norm_launch,
        bound=cases.fwd_bound,
        roles=Roles("x v v -", "x s s"),
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_dx, bool need_dw,"
                " bool need_db, ScalarType? bias_dtype) -> (Tensor dx, Tensor dw, Tensor db)"
            ),
            reference=layer_norm_bwd_reference,
            launch=layer_norm_bwd_launch,
            bound=cases.bwd_bound,
            roles=Roles("x x v s s - - - -", "x5 v6 v7"),
            tuned=Tuned(
                ("norm/layer_norm_bwd", "norm/layer_norm_bwd_shared", "norm/norm_bwd_wide", "shared_rows"),
                ("one_pass", "chunked", "shared"),
                chunk_rows=(1, 2, 4),
            ),
            formula=layer_norm_bwd_formula,
        ),
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
        onnx=layer_norm_onnx,
        module=nn.LayerNorm,
        tuned=Tuned(("norm/layer_norm", "norm/layer_norm_cluster"), ("one_pass", "chunked"), clustered=True),
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_TRAIN = implementations("layer_norm_fwd", train_reference, layer_norm_launch)
_INFER = implementations("layer_norm_fwd", torch.layer_norm, infer_launch)
_APPLY = fast_applies(_LayerNorm, _forward, _TRAIN)
