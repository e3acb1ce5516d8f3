"""Layer norm: fused_layernorm, its raw operators, and its SPEC."""

from __future__ import annotations

import functools
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _cases
from ._autograd import FLOATS, autocasts_to_fp32, differentiable_backward, plain_aten
from ._backend import NO_FP64, note_fallback
from ._checks import refuse, require_device, require_float, require_shape, require_tensor
from ._compiled import Planned
from ._direct import implementations, short_applies, short_way
from ._launch import (
    KERNEL_DTYPES,
    column_sums,
    device_facts,
    empty_of,
    facts_of,
    launch,
    launch_planned,
    plan,
    rows_and_strides,
    rows_of,
)
from ._spec import Backward, OpSpec, define


@functools.cache
def _kernels() -> Any:
    from ._tune import measured
    from .kernels import layer_norm, layer_norm_bwd, rows

    return layer_norm, layer_norm_bwd, rows, measured


@functools.cache
def _clusters() -> Any:
    from ._cluster import clusters_wanted
    from .kernels import layer_norm_cluster

    return layer_norm_cluster, clusters_wanted


def _stats_dtype(x: Tensor) -> torch.dtype:
    """fp32, as the kernels accumulate in; fp64 for fp64, which only ATen computes."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """(y, mean, rstd) in ATen. x (..., N); weight, bias (N,); y as x; mean, rstd of x.shape[:-1] in fp32 (fp64 for fp64)."""
    N = x.shape[-1]
    dtype = _stats_dtype(x)
    if x.dtype is dtype and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype):
        y, mean, rstd = torch.native_layer_norm(x, [N], weight, bias, eps)
        return y.contiguous(), mean.squeeze(-1), rstd.squeeze(-1)
    wide = x.to(dtype)
    if N == 0 or x.dim() == 0:
        mean = rstd = wide.new_zeros(x.shape[:-1])
    else:
        var, mean = torch.var_mean(wide, dim=-1, correction=0)
        rstd = torch.rsqrt(var + eps)
    return F.layer_norm(x, [N], weight, bias, eps).contiguous(), mean, rstd


def layer_norm_launch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """layer_norm_reference by Triton kernels."""
    if x.dtype not in KERNEL_DTYPES:
        note_fallback("layer_norm", NO_FP64)
        return layer_norm_reference(x, weight, bias, eps)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    y = empty_of(x, x.dtype)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    _launch_fwd(x, weight, bias, y, mean, rstd, eps)
    return y, mean, rstd


def _launch_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, mean: Tensor | None, rstd: Tensor | None, eps: float
) -> None:
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    w_dtype, b_dtype = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    stats = mean is not None
    planned = _fwd_plan(
        M, x.shape[-1], stride_xm, stride_xn, float(eps), x.dtype, w_dtype, b_dtype, stats, x.get_device()
    )  # fmt: skip
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    launch_planned(planned, rows, weight, bias, y, x if mean is None else mean, x if rstd is None else rstd)


@plan
def _fwd_plan(
    M: int, N: int, stride_xm: int, stride_xn: int, eps: float,
    dtype: torch.dtype, w_dtype: torch.dtype | None, b_dtype: torch.dtype | None, stats: bool, device: int,
) -> Planned:  # fmt: skip
    """The launch of the forward. w_dtype, b_dtype: None without a weight, a bias."""
    fwd, _, rows, measured = _kernels()
    itemsize = dtype.itemsize
    vec, edges, same = rows.row_vectors(N, itemsize, stride_xn, (stride_xm, N))
    config = measured("layer_norm_fwd", M, N, itemsize, device)
    cluster, clusters_wanted = _clusters()
    if config is None:
        config = fwd.layer_norm_fwd_config(M, N, itemsize, *facts_of(device), vec > 1 and not edges)
        if vec > 1 and not edges and clusters_wanted(device):
            config = cluster.layer_norm_fwd_cluster_config(config, N)
    options = {
        "stride_xm": stride_xm, "stride_xn": stride_xn, "stride_ym": N, "eps": eps,
        "HAS_WEIGHT": w_dtype is not None, "HAS_BIAS": b_dtype is not None, "STATS": stats, "VEC": vec, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.num_ctas > 1:
        options |= {"VEC": 1 if edges else vec, "num_ctas": config.num_ctas}
        return Planned(device, cluster.layer_norm_fwd_cluster_kernel, M, (N,), options)
    options |= {"EDGES": edges, "SAME": same}
    if config.chunked:
        return Planned(device, fwd.layer_norm_fwd_chunked_kernel, M, (N,), options)
    tiles = rows.row_tiles(M, config.block_m, vec if edges else 1)
    return Planned(device, fwd.layer_norm_fwd_kernel, tiles, (M, N), {**options, "BLOCK_M": config.block_m})


def _train_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """layer_norm_reference with statistics as ATen has them, (..., 1): squeezing them here would take 2 µs."""
    if x.dtype is torch.float32:  # and so must weight and bias be, in ATen
        return torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def _infer_launch(x: Tensor, shape: tuple[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch.layer_norm over the last dimension, which shape is the size of: y alone, no statistics without a backward."""
    if x.dtype not in KERNEL_DTYPES:
        return torch.layer_norm(x, shape, weight, bias, eps)
    y = empty_of(x, x.dtype)
    if x.numel() != 0:
        _launch_fwd(x, weight, bias, y, None, None, eps)
    return y


def layer_norm_bwd_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_dx: bool, need_dw: bool, need_db: bool, bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw, db) in ATen, in fp32 for half precision: ATen's own half-precision dw and db lose the small terms.

    dw in weight's dtype, db in bias_dtype; a gradient not needed is an empty tensor.
    """
    dtype = mean.dtype
    N = x.shape[-1]
    stats = (*x.shape[:-1], 1)
    grads = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype), x.to(dtype), [N], mean.reshape(stats), rstd.reshape(stats),
        None if weight is None else weight.to(dtype), None, [need_dx, False, False],
    )  # fmt: skip
    dx = grads[0].to(x.dtype).contiguous() if need_dx else x.new_empty((0,))
    rows = dy.to(dtype).reshape(-1, N) if N else dy.to(dtype).reshape(0, 0)
    dw = x.new_empty((0,))
    if need_dw:
        x_hat = (x.to(dtype).reshape(rows.shape) - mean.reshape(-1, 1)) * rstd.reshape(-1, 1)
        dw = (rows * x_hat).sum(0).to(x.dtype if weight is None else weight.dtype)
    db = rows.sum(0).to(x.dtype if bias_dtype is None else bias_dtype) if need_db else x.new_empty((0,))
    return dx, dw, db


def layer_norm_bwd_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_dx: bool, need_dw: bool, need_db: bool, bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """layer_norm_bwd_reference by Triton kernels; the same bits on every run."""
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        return layer_norm_bwd_reference(dy, x, weight, mean, rstd, need_dx, need_dw, need_db, bias_dtype)
    _, bwd, rows, measured = _kernels()
    N = x.shape[-1]
    dy2, x2 = rows_of(dy), rows_of(x)
    M = x2.shape[0]
    weight = weight if weight is None else weight.contiguous()
    capability, sms = device_facts(x)
    column_stride = 1 if dy2.stride(1) == x2.stride(1) == 1 else 0
    vec = rows.whole_vectors(N, x.element_size(), column_stride, (dy2.stride(0), x2.stride(0), N))
    config = measured("layer_norm_bwd", M, N, x.element_size(), x.get_device())
    config = config or bwd.layer_norm_bwd_config(M, N, x.element_size(), capability, sms, vec > 1)
    programs = bwd.layer_norm_bwd_programs(M, config, sms)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else x.new_empty((0,))
    parts = torch.empty((int(need_dw) + int(need_db), programs, N), dtype=torch.float32, device=x.device)
    dw_part = parts[0] if need_dw else parts
    db_part = parts[-1] if need_db else parts
    launch(
        bwd.layer_norm_bwd_chunked_kernel if config.chunked else bwd.layer_norm_bwd_kernel, programs, x,
        dy2, x2, x if weight is None else weight, mean, rstd, dx, dw_part, db_part, M, N,
        stride_dym=dy2.stride(0), stride_dyn=dy2.stride(1), stride_xm=x2.stride(0), stride_xn=x2.stride(1), stride_dxm=N,
        HAS_WEIGHT=weight is not None, NEED_DX=need_dx, NEED_DW=need_dw, NEED_DB=need_db,
        VEC=vec, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip

    dw_dtype = x.dtype if weight is None else weight.dtype
    db_dtype = x.dtype if bias_dtype is None else bias_dtype
    sums = column_sums(parts, dw_dtype if need_dw else db_dtype, db_dtype) if need_dw or need_db else []
    return dx, sums[0] if need_dw else x.new_empty((0,)), sums[-1] if need_db else x.new_empty((0,))


def _forward(run: Any, ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y, mean, rstd = run(x, weight, bias, eps)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.eps = eps
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return _forward(_FWD, ctx, x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_backward(_plain_rows, (x, weight, bias, ctx.eps), dy)[:3], None
        if mean.dim() == x.dim():
            mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
        need_dx, need_dw, need_db, _ = ctx.needs_input_grad
        bias_dtype = None if bias is None else bias.dtype
        dx, dw, db = _BWD(dy, x, weight, mean, rstd, need_dx, need_dw, need_db, bias_dtype)
        return dx if need_dx else None, dw if need_dw else None, db if need_db else None, None


def _plain_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None and bias is not None:  # ATen's own double backward loses the bias here
        return F.layer_norm(x, [x.shape[-1]], None, None, eps) + bias.to(x.dtype)
    return F.layer_norm(x, [x.shape[-1]], weight, bias, eps)


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
        normalized_shape: the trailing dimensions to normalise over; a sequence of ints, or one int.
        weight: of shape normalized_shape, or None. It may be of another float dtype than input (fp32 with bf16).
        bias: of shape normalized_shape, or None; likewise.
        eps: added to the variance.

    Returns:
        A contiguous tensor of input's shape and dtype. Under CUDA autocast, input, weight and bias are cast to float32, and
        the result is float32, as torch's.

    Raises:
        RuntimeError: a shape that does not fit, tensors on different devices.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    Statistics are computed in fp32. Gradients for input, weight and bias, each only when needed, the same bits on every
    run; differentiable twice. Source: Ba, Kiros, Hinton, Layer Normalization, 2016.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    else:
        return _fused_layernorm(input, normalized_shape, weight, bias, eps)


def _fused_layernorm(
    input: Tensor, normalized_shape: Union[int, list[int]], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    way = short_way(input, weight, bias)
    if way == "aten":
        if input.dtype in FLOATS:
            try:
                return _INFER[way](input, shape, weight, bias, eps)
            except Exception:  # what ATen refuses is refused below, in our words
                pass
    elif way and len(shape) == 1 and _fits(input, shape, weight, bias):
        if way == "cuda":
            return _INFER[way](input, shape, weight, bias, eps)
        return _APPLY[way](input, weight, bias, eps)
    if has_torch_function_variadic(input, weight, bias):
        overridable = tuple(t for t in (input, weight, bias) if t is not None)
        return handle_torch_function(fused_layernorm, overridable, input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    _check(input, shape, weight, bias)
    if plain_aten("layer_norm"):
        return F.layer_norm(input, shape, weight, bias, eps)
    if autocasts_to_fp32(input):
        input = input.float() if input.dtype is not torch.float64 else input
        weight = weight.to(input.dtype) if weight is not None else None
        bias = bias.to(input.dtype) if bias is not None else None
    if len(shape) == 1:
        return _rows(input, weight, bias, eps)
    rows = input.flatten(-len(shape))
    flat_weight = weight.flatten() if weight is not None else None
    flat_bias = bias.flatten() if bias is not None else None
    return _rows(rows, flat_weight, flat_bias, eps).view(input.shape)


def _rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension, by the autograd Function only when something needs a gradient."""
    if _needs_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps)
    return _FWD(x, weight, bias, eps)[0]


def _needs_grad(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )


def _fits(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> bool:
    """What _check checks, in one expression, for tensors on one device and one normalised dimension."""
    sizes = x.shape
    return (
        len(sizes) > 0
        and sizes[-1] == shape[0]
        and x.dtype in FLOATS
        and (weight is None or (weight.shape == shape and weight.dtype in FLOATS))
        and (bias is None or (bias.shape == shape and bias.dtype in FLOATS))
    )


def _check(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    op = "fused_layernorm"
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


SPEC = define(
    OpSpec(
        name="layer_norm",
        public=fused_layernorm,
        torch_fn=F.layer_norm,
        schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
        reference=layer_norm_reference,
        launch=layer_norm_launch,
        bound=_cases.layer_norm.fwd_bound,
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_dx, bool need_dw,"
                " bool need_db, ScalarType? bias_dtype) -> (Tensor dx, Tensor dw, Tensor db)"
            ),
            reference=layer_norm_bwd_reference,
            launch=layer_norm_bwd_launch,
            bound=_cases.layer_norm.bwd_bound,
        ),
        samples=_cases.layer_norm.samples,
        errors=_cases.layer_norm.errors,
        bench=_cases.layer_norm.BENCH,
        audit=_cases.layer_norm.audit,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_TRAIN = implementations("layer_norm_fwd", _train_reference, layer_norm_launch)
_INFER = implementations("layer_norm_fwd", torch.layer_norm, _infer_launch)
_APPLY = short_applies(_LayerNorm, _forward, _TRAIN)
