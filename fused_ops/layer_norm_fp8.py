"""Layer norm with its output quantised to fp8, for inference: fused_layernorm_fp8, its raw operator, and its SPEC."""

from __future__ import annotations

import functools
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _cases
from ._backend import NO_FP64, note_fallback
from ._checks import refuse, refuse_gradients, require_device, require_float, require_shape, require_tensor
from ._launch import KERNEL_DTYPES, device_facts, interpreting, launch, rows_and_strides
from ._matmul_plan import FP8
from ._spec import NO_BACKWARD, OpSpec, define

CVT_CAPABILITY = (8, 9)  # Ada: the first with an instruction that converts to e4m3


@functools.cache
def _kernels() -> Any:
    from .kernels import layer_norm_fp8, rows

    return layer_norm_fp8, rows.whole_vectors


def layer_norm_fp8_plain(
    input: Tensor,
    normalized_shape: list[int],
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """What fused_layernorm_fp8 computes, as PyTorch users write it today: the layer norm in fp32, then quantised by rows."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    w = None if weight is None else weight.to(wide)
    b = None if bias is None else bias.to(wide)
    y = F.layer_norm(input.to(wide), normalized_shape, w, b, eps).flatten(input.dim() - len(normalized_shape))
    top = y.abs().amax(-1) if y.shape[-1] > 0 else y.new_zeros(y.shape[:-1])
    scale = top.clamp(min=1e-12) / 448.0
    q = (y / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return q.view(input.shape).contiguous(), scale.to(torch.float32)


def layer_norm_fp8_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(q, scale) in ATen. x (..., N); weight, bias (N,); q e4m3 as x; scale of x.shape[:-1] in fp32."""
    return layer_norm_fp8_plain(x, [x.shape[-1]], weight, bias, eps)


def layer_norm_fp8_launch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """layer_norm_fp8_reference by one Triton kernel."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        if x.numel():
            note_fallback("layer_norm_fp8", NO_FP64)
        return layer_norm_fp8_reference(x, weight, bias, eps)
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    N = x.shape[-1]
    kernels, whole_vectors = _kernels()
    capability, sms = device_facts(x)
    config = kernels.layer_norm_fp8_config(M, N, x.element_size(), sms)
    options = {
        "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_qm": N, "eps": eps,
        "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "CVT": capability >= CVT_CAPABILITY and not interpreting(),  # the interpreter's own conversion is wrong
        "VEC": whole_vectors(N, x.element_size(), stride_xn, (stride_xm, N)), "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
    }  # fmt: skip
    tensors = (rows, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), q, scale)
    if config.chunked:
        launch(kernels.layer_norm_fp8_chunked_kernel, M, x, *tensors, N, **options)
    else:
        grid = -(-M // config.block_m)
        launch(kernels.layer_norm_fp8_kernel, grid, x, *tensors, M, N, **options, BLOCK_M=config.block_m)
    return q.view(FP8), scale


def fused_layernorm_fp8(
    input: Tensor,
    normalized_shape: list[int],
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Layer normalisation with its result quantised to fp8, a scale a row, in one kernel: for inference.

    y = (input - mean) / sqrt(var + eps) * weight + bias as fused_layernorm's; scale = max |y| / 448 over the row; the result
    is y / scale rounded to e4m3. fused_linear_fp8 takes both as its x and x_scale.

    Args:
        input: (*, *normalized_shape), float32, float16, bfloat16 or float64, any strides.
        normalized_shape: the trailing dimensions to normalise over; a sequence of ints, or one int.
        weight: of shape normalized_shape, or None. It may be of another float dtype than input.
        bias: of shape normalized_shape, or None; likewise.
        eps: added to the variance.

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
        return layer_norm_fp8_plain(input, normalized_shape, weight, bias, eps)
    else:
        return _fused_layernorm_fp8(input, normalized_shape, weight, bias, eps)


def _fused_layernorm_fp8(
    input: Tensor, normalized_shape: Union[int, list[int]], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if has_torch_function_variadic(input, weight, bias):
        given = tuple(t for t in (input, weight, bias) if t is not None)
        return handle_torch_function(fused_layernorm_fp8, given, input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    _check(input, shape, weight, bias)
    if len(shape) == 1:
        return _FWD(input, weight, bias, eps)
    flat_weight = weight.flatten() if weight is not None else None
    flat_bias = bias.flatten() if bias is not None else None
    q, scale = _FWD(input.flatten(-len(shape)), flat_weight, flat_bias, eps)
    return q.view(input.shape), scale


def _check(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    op = "fused_layernorm_fp8"
    require_tensor(op, "input", x)
    require_float(op, "input", x)
    if len(shape) == 0:
        refuse(RuntimeError, op, "normalized_shape", shape, "at least one dimension")
    if x.shape[-len(shape) :] != shape:
        got = f"{shape} with input of shape {tuple(x.shape)}"
        refuse(RuntimeError, op, "normalized_shape", got, f"the last dimensions of input, here {tuple(x.shape[-len(shape) :])}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            require_tensor(op, name, parameter, optional=True)
            require_float(op, name, parameter)
            require_shape(op, name, parameter, shape)
            require_device(op, name, parameter, x.device)
    refuse_gradients(op, (("input", x), ("weight", weight), ("bias", bias)))


SPEC = define(
    OpSpec(
        name="layer_norm_fp8",
        public=fused_layernorm_fp8,
        torch_fn=layer_norm_fp8_plain,
        schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor q, Tensor scale)",
        reference=layer_norm_fp8_reference,
        launch=layer_norm_fp8_launch,
        bound=_cases.layer_norm_fp8.fwd_bound,
        backward=NO_BACKWARD,
        samples=_cases.layer_norm_fp8.samples,
        errors=_cases.layer_norm_fp8.errors,
        bench=_cases.layer_norm_fp8.BENCH,
        audit=_cases.layer_norm_fp8.audit,
    )
)
_FWD = SPEC.fwd
