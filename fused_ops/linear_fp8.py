"""Linear in fp8 with scales, bias and activation, for inference: fused_linear_fp8, its raw operator, and its SPEC."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _cases
from ._activations import activate, check_activation
from ._checks import refuse, refuse_gradients, require_device, require_float, require_shape, require_tensor
from ._launch import device_facts, rows_of
from ._matmul import matmul
from ._matmul_plan import FP8
from ._spec import NO_BACKWARD, OpSpec, define

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 9)  # Ada: the first tensor cores that multiply e4m3


def linear_fp8_plain(
    x: Tensor,
    w_fp8: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Optional[Tensor] = None,
    activation: Optional[str] = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """What fused_linear_fp8 computes, in fp32 on dequantised tensors."""
    if activation is None:
        activation = "none"
    xs = x_scale if x_scale.numel() == 1 else x_scale.reshape(x.shape[:-1]).unsqueeze(-1)
    product = F.linear(x.float(), w_fp8.float()) * xs.float() * w_scale.reshape(-1).float()
    return activate(product if bias is None else product + bias.float(), activation).to(out_dtype)


def linear_fp8_reference(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    """y (..., N) in ATen. x (..., K), weight (N, K) e4m3; scales fp32 of one element, or of x.shape[:-1] and of (N,)."""
    return linear_fp8_plain(x, weight, x_scale, w_scale, bias, activation, out_dtype).contiguous()


def linear_fp8_launch(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    """linear_fp8_reference by one Triton kernel, two for small M; in ATen on GPUs that cannot multiply e4m3."""
    if device_facts(x)[0] < LEAST_CAPABILITY:
        return linear_fp8_reference(x, weight, x_scale, w_scale, bias, activation, out_dtype)
    N, K = weight.shape
    y = torch.empty((*x.shape[:-1], N), dtype=out_dtype, device=x.device)
    x2 = rows_of(x) if K else x.new_empty((math.prod(x.shape[:-1]), 0))
    matmul(x2, weight, bias, y, y, activation, False, x_scale.reshape(-1), w_scale.reshape(-1))
    return y


def fused_linear_fp8(
    x: Tensor,
    w_fp8: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Optional[Tensor] = None,
    activation: Optional[str] = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """activation((x @ w_fp8^T) * x_scale * w_scale + bias) in one kernel, from e4m3 operands: for inference.

    Args:
        x: (*, K), float8_e4m3fn, any strides. The real input is x * x_scale.
        w_fp8: (N, K), float8_e4m3fn, any strides; fastest with K contiguous and a multiple of 16.
        x_scale: float32, one element for all of x, or one a row: of shape x.shape[:-1], or with a further 1 behind it.
        w_scale: float32, one element for all of w_fp8, or one a row: (N,), (N, 1) or (1, N).
        bias: (N,), float32, float16 or bfloat16; or None.
        activation: as in fused_linear.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        (*, N), contiguous, of out_dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an unknown activation; a tensor that requires a gradient
            while gradients are recorded, for this op has none.
        NotImplementedError (a RuntimeError): x of another dtype than float8_e4m3fn.
        TypeError: an argument of the wrong type.

    Accumulates in fp32. Hopper's fp8 tensor cores keep fewer bits in their own sums, so every 128 products are added to
    an fp32 sum. Before Ada (capability 8.9) the operands are widened and multiplied by ATen.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return linear_fp8_plain(x, w_fp8, x_scale, w_scale, bias, activation, out_dtype)
    else:
        return _fused_linear_fp8(x, w_fp8, x_scale, w_scale, bias, activation, out_dtype)


def _fused_linear_fp8(
    x: Tensor, w_fp8: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str | None, out_dtype: Any
) -> Tensor:
    tensors = (x, w_fp8, x_scale, w_scale, bias)
    if has_torch_function_variadic(*tensors):
        given = tuple(t for t in tensors if t is not None)
        return handle_torch_function(fused_linear_fp8, given, *tensors, activation, out_dtype)
    name = "none" if activation is None else activation
    _check(x, w_fp8, x_scale, w_scale, bias, name, out_dtype)
    return _FWD(x, w_fp8, x_scale, w_scale, bias, name, out_dtype)


def _check(
    x: Tensor, w_fp8: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: Any
) -> None:
    op = "fused_linear_fp8"
    tensors = (("x", x), ("w_fp8", w_fp8), ("x_scale", x_scale), ("w_scale", w_scale), ("bias", bias))
    for name, tensor in tensors:
        require_tensor(op, name, tensor, optional=name == "bias")
    check_activation(op, activation)
    if x.dtype is not FP8:
        refuse(NotImplementedError, op, "x", x.dtype, "torch.float8_e4m3fn")
    if w_fp8.dtype is not FP8:
        refuse(RuntimeError, op, "w_fp8", w_fp8.dtype, "torch.float8_e4m3fn")
    if w_fp8.dim() != 2:
        refuse(RuntimeError, op, "w_fp8", f"shape {tuple(w_fp8.shape)}", "shape (N, K)")
    N, K = w_fp8.shape
    if x.dim() == 0 or x.shape[-1] != K:
        refuse(RuntimeError, op, "x", f"shape {tuple(x.shape)}", f"last dimension K = {K} of w_fp8 {tuple(w_fp8.shape)}")
    rows = tuple(x.shape[:-1])
    for name, scale, shapes in (("x_scale", x_scale, (rows, (*rows, 1))), ("w_scale", w_scale, ((N,), (N, 1), (1, N)))):
        if scale.dtype is not torch.float32:
            refuse(RuntimeError, op, name, scale.dtype, "torch.float32")
        if scale.numel() != 1 and tuple(scale.shape) not in shapes:
            refuse(RuntimeError, op, name, f"shape {tuple(scale.shape)}", f"one element, or one of the shapes {shapes}")
    if bias is not None:
        require_float(op, "bias", bias)
        require_shape(op, "bias", bias, (N,))
    if out_dtype not in OUT_DTYPES:
        refuse(RuntimeError, op, "out_dtype", out_dtype, ", ".join(map(str, OUT_DTYPES)))
    for name, tensor in tensors:
        if tensor is not None:
            require_device(op, name, tensor, x.device)
    refuse_gradients(op, tensors)


SPEC = define(
    OpSpec(
        name="linear_fp8",
        public=fused_linear_fp8,
        torch_fn=linear_fp8_plain,
        schema=(
            "(Tensor x, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor? bias, str activation, ScalarType out_dtype)"
            " -> Tensor"
        ),
        reference=linear_fp8_reference,
        launch=linear_fp8_launch,
        bound=_cases.linear_fp8.fwd_bound,
        backward=NO_BACKWARD,
        samples=_cases.linear_fp8.samples,
        errors=_cases.linear_fp8.errors,
        bench=_cases.linear_fp8.BENCH,
        audit=_cases.linear_fp8.audit,
    )
)
_FWD = SPEC.fwd
