"""Layer norm with its output quantised to fp8, for inference: fused_layernorm_fp8, its raw operator, and its SPEC."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..._torch.arguments import refuse_gradients
from ..._torch.autograd import runs_aten
from ..._torch.eager import fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Op, Roles
from .arguments import checked, dims_of, fits, number, over_rows
from .cases import layer_norm_fp8 as cases
from .layer_norm_fp8_launch import layer_norm_fp8_launch
from .layer_norm_fp8_reference import layer_norm_fp8_eager, layer_norm_fp8_reference


def fused_layernorm_fp8(
    input: Tensor,
    normalized_shape: list[int],
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Layer normalisation with its result quantised to fp8, a scale a row, in one kernel: for inference.

    y = (input - mean) / sqrt(var + eps) * weight + bias as fused_layernorm's; scale = max |y| / 448 over the row; the result
    is y / scale rounded to e4m3. fused_linear_fp8 takes both as its input and input_scale.

    Args:
        input: (*, *normalized_shape), float32, float16, bfloat16 or float64, any strides.
        normalized_shape: the trailing dimensions to normalise over; a list or tuple of ints, or one int.
        weight: of shape normalized_shape, or None; of any of these dtypes, whatever input's and bias's are.
        bias: of shape normalized_shape, or None; likewise.
        eps: added to the variance; a number.

    Returns:
        (q, scale): q float8_e4m3fn of input's shape, contiguous; scale float32 of input's leading shape. y is about
        q * scale: within half a spacing of e4m3. A row of zeros has the scale 1e-12 / 448; a NaN makes its row's NaN.

    Raises:
        RuntimeError: a shape that does not fit, tensors on different devices; a tensor that requires a gradient while
            gradients are recorded, for this op has none.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    Statistics and y are in fp32, and y is rounded once, to e4m3. Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return layer_norm_fp8_eager(input, normalized_shape, weight, bias, eps)
    else:
        return _fused_layernorm_fp8(input, normalized_shape, weight, bias, eps)


def _fused_layernorm_fp8(
    input: Tensor, normalized_shape: Union[int, list[int]], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else dims_of(normalized_shape)
    way = fast_path(input, weight, bias)
    if (way == "aten" or way == "cuda") and type(eps) is float and fits(input, shape, weight, bias):
        return _INFER[way](input, weight, bias, eps)
    if overrides(input, weight, bias):
        return overridden(SPEC, (input, weight, bias), input, shape, weight, bias, eps)
    shape = checked("fused_layernorm_fp8", input, shape, weight=weight, bias=bias)
    eps = number("fused_layernorm_fp8", eps)
    refuse_gradients("fused_layernorm_fp8", (("input", input), ("weight", weight), ("bias", bias)))
    if runs_aten("layer_norm_fp8"):
        return layer_norm_fp8_eager(input, shape, weight, bias, eps)  # type: ignore[arg-type]
    return over_rows(lambda x, w, b: _FWD(x, w, b, eps), input, shape, weight, bias)


SPEC = define(
    Op(
        name="layer_norm_fp8",
        public=fused_layernorm_fp8,
        torch_fn=layer_norm_fp8_eager,
        schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor q, Tensor scale)",
        reference=layer_norm_fp8_reference,
        launch=layer_norm_fp8_launch,
        bound=cases.fwd_bound,
        roles=Roles("x v v -", "x s"),
        backward=None,
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
    )
)
_FWD = SPEC.fwd
_INFER = implementations("layer_norm_fp8_fwd", layer_norm_fp8_reference, layer_norm_fp8_launch)
