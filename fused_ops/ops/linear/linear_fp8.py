"""Linear in fp8 with scales, bias and activation, for inference: fused_linear_fp8, its raw operator, and its SPEC."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..._runtime.device import FP8
from ..._torch.arguments import (
    is_one,
    refuse,
    refuse_gradients,
    require_device,
    require_dtype,
    require_shape,
    require_tensor,
    same_shape,
)
from ..._torch.autograd import runs_aten
from ..._torch.eager import fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Op, Roles
from .activations import ACTIVATIONS, check_activation
from .cases import linear_fp8 as cases
from .linear_fp8_launch import linear_fp8_launch, plan_of
from .linear_fp8_reference import linear_fp8_eager, linear_fp8_reference

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_linear_fp8(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Optional[Tensor] = None,
    activation: Optional[str] = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear with e4m3 operands and their scales, in one kernel: for inference.

    y = activation((input @ weight^T) * input_scale * weight_scale + bias).

    Args:
        input: (*, K), float8_e4m3fn, any strides. The real input is input * input_scale.
        weight: (N, K), float8_e4m3fn, any strides; fastest with K contiguous and a multiple of 16.
        input_scale: float32, one element for all of input, or one a row: of shape input.shape[:-1] or (*input.shape[:-1], 1).
        weight_scale: float32, one element for all of weight, or one a row: (N,), (N, 1) or (1, N).
        bias: (N,), float32, float16 or bfloat16; or None.
        activation: as in fused_linear.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        (*, N), contiguous, of out_dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an unknown activation; a tensor that requires a gradient
            while gradients are recorded, for this op has none.
        NotImplementedError (a RuntimeError): input of another dtype than float8_e4m3fn.
        TypeError: an argument of the wrong type.

    Accumulates in fp32. Hopper's fp8 tensor cores keep fewer bits in their own sums, so every 128 products are added to
    an fp32 sum. There more than 256 rows are multiplied by torch._scaled_mm, where it takes the operands as they are. Before Ada (capability 8.9) the operands are widened and multiplied by ATen.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return linear_fp8_eager(input, weight, input_scale, weight_scale, bias, activation, out_dtype)
    else:
        return _fused_linear_fp8(input, weight, input_scale, weight_scale, bias, activation, out_dtype)


def _fused_linear_fp8(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: Any,
) -> Tensor:
    tensors = (input, weight, input_scale, weight_scale, bias)
    way = fast_path(*tensors)
    if (way == "aten" or way == "cuda") and _fits(*tensors, activation, out_dtype):
        return _RUN[way](*tensors, activation or "none", out_dtype)
    name = "none" if activation is None else activation
    check_activation("fused_linear_fp8", name)
    if overrides(*tensors):
        return overridden(SPEC, tensors, *tensors, activation, out_dtype)
    _check(input, weight, input_scale, weight_scale, bias, out_dtype)
    if runs_aten("linear_fp8"):
        return linear_fp8_eager(*tensors, name, out_dtype)
    return _FWD(input, weight, input_scale, weight_scale, bias, name, out_dtype)


def _fits(
    x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str | None, out_dtype: Any
) -> bool:  # fmt: skip
    """What _check checks, for tensors on one device, and without words; scales of other shapes than (*) and (N,) aside."""
    try:
        if not (x.dtype is FP8 and weight.dtype is FP8 and x.dim() and weight.dim() == 2 and x.shape[-1] == weight.shape[1]):
            return False
        rows, columns = x.shape[:-1], weight.shape[:1]
        return (
            input_scale.dtype is torch.float32
            and weight_scale.dtype is torch.float32
            and (input_scale.shape == rows or input_scale.dim() == 0)
            and (weight_scale.shape == columns or weight_scale.dim() == 0)
            and (bias is None or (bias.dtype in OUT_DTYPES and bias.shape == columns))
            and (activation is None or activation in ACTIVATIONS)
            and type(out_dtype) is torch.dtype
            and out_dtype in OUT_DTYPES
        )
    except Exception:  # None has no dtype, an activation may have no hash
        return False


def _check(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: Any,
) -> None:
    op = "fused_linear_fp8"
    tensors = (
        ("input", input),
        ("weight", weight),
        ("input_scale", input_scale),
        ("weight_scale", weight_scale),
        ("bias", bias),
    )
    for name, tensor in tensors:
        require_tensor(op, name, tensor, optional=name == "bias")
    if input.dtype is not FP8:
        refuse(NotImplementedError, op, "input", input.dtype, "torch.float8_e4m3fn")
    if weight.dtype is not FP8:
        refuse(RuntimeError, op, "weight", weight.dtype, "torch.float8_e4m3fn")
    if weight.dim() != 2:
        refuse(RuntimeError, op, "weight", f"shape {tuple(weight.shape)}", "shape (N, K)")
    N, K = weight.shape
    if input.dim() == 0 or input.shape[-1] != K:
        refuse(
            RuntimeError, op, "input", f"shape {tuple(input.shape)}", f"last dimension K = {K} of weight {tuple(weight.shape)}"
        )
    rows = tuple(input.shape[:-1])
    for name, scale, shapes in (
        ("input_scale", input_scale, (rows, (*rows, 1))),
        ("weight_scale", weight_scale, ((N,), (N, 1), (1, N))),
    ):
        if scale.dtype is not torch.float32:
            refuse(RuntimeError, op, name, scale.dtype, "torch.float32")
        if not is_one(scale.numel()) and not any(same_shape(scale.shape, shape) for shape in shapes):
            refuse(RuntimeError, op, name, f"shape {tuple(scale.shape)}", f"one element, or one of the shapes {shapes}")
    if bias is not None:
        require_dtype(op, "bias", bias.dtype, OUT_DTYPES, RuntimeError)
        require_shape(op, "bias", bias, (N,))
    require_dtype(op, "out_dtype", out_dtype, OUT_DTYPES, RuntimeError)
    for name, tensor in tensors:
        if tensor is not None:
            require_device(op, name, tensor, input.device)
    refuse_gradients(op, tensors)


SPEC = define(
    Op(
        name="linear_fp8",
        public=fused_linear_fp8,
        torch_fn=linear_fp8_eager,
        schema=(
            "(Tensor x, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? bias, str activation, ScalarType out_dtype)"
            " -> Tensor"
        ),
        reference=linear_fp8_reference,
        launch=linear_fp8_launch,
        bound=cases.fwd_bound,
        roles=Roles("x w q q b - -", "y"),
        backward=None,
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
        reason=lambda *args: plan_of(*args)[0].reason,
    )
)
_FWD = SPEC.fwd
_RUN = implementations("linear_fp8_fwd", linear_fp8_reference, linear_fp8_launch)
