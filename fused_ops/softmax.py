"""Softmax: fused_softmax, its raw operators, and its SPEC."""

from __future__ import annotations

import functools
import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _cases
from ._autograd import FLOATS, autocasts_to_fp32, plain_aten
from ._backend import NO_FP64, note_fallback
from ._checks import normalize_dim, refuse, require_float, require_tensor
from ._compiled import Planned
from ._direct import implementations, short_applies, short_way
from ._launch import device_facts, empty_of, facts_of, interpreting, launch, launch_planned, plan, rows_and_strides
from ._spec import Backward, OpSpec, define


@functools.cache
def _inner_kernels() -> Any:
    from .kernels import softmax_inner

    return softmax_inner


@functools.cache
def _row_kernels() -> Any:
    from ._cluster import clusters_wanted
    from ._tune import measured
    from .kernels import rows, softmax, softmax_cluster, softmax_packed

    return softmax, softmax_packed, softmax_cluster, rows.row_vectors, measured, clusters_wanted


def softmax_reference(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """softmax(x) over dim in ATen; y contiguous, in dtype or x's."""
    return torch.softmax(x, dim, dtype)  # contiguous, whatever the strides of x


def softmax_launch(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """softmax_reference by Triton kernels: one over the last dimension, one over an inner dimension."""
    out_dtype = x.dtype if dtype is None else dtype
    if torch.float64 in (x.dtype, out_dtype) or x.dim() == 0:
        if x.dim():
            note_fallback("softmax", NO_FP64)
        return softmax_reference(x, dim, dtype)
    y = empty_of(x, out_dtype)
    if x.numel() == 0:
        return y
    if not x.is_floating_point():
        x = x.float()
    if dim == x.dim() - 1 or _is_last(x, dim):
        _launch_fwd_rows(x if dim == x.dim() - 1 else x.flatten(dim), y)
        return y
    inner = _inner_kernels()
    facts = device_facts(x)
    N = x.shape[dim]
    x3, y3 = _around(x, dim), _around(y, dim)
    K = x3.shape[2]
    config = inner.softmax_inner_config(N, K, x.element_size(), *facts)
    launch(
        inner.softmax_fwd_inner_kernel, x3.shape[0] * -(-K // config.block_m), x, x3, y3, N, K,
        **_strides("x", x3), **_strides("y", y3),
        BLOCK_N=config.block_n, BLOCK_K=config.block_m, CHUNKED=config.chunked, num_warps=config.num_warps,
    )  # fmt: skip
    return y


def softmax_bwd_reference(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx = (dy - sum(dy * y)) * y over dim in ATen, in at least fp32; dx contiguous, in dtype."""
    wide = torch.float64 if y.dtype is torch.float64 else torch.float32
    return torch._softmax_backward_data(dy.to(wide), y.to(wide), dim, wide).to(dtype).contiguous()


def softmax_bwd_launch(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """softmax_bwd_reference by Triton kernels."""
    if torch.float64 in (dy.dtype, y.dtype, dtype) or y.dim() == 0:
        return softmax_bwd_reference(dy, y, dim, dtype)
    dx = empty_of(y, dtype)
    if y.numel() == 0:
        return dx
    if dim == y.dim() - 1 or _is_last(y, dim):
        last = dim == y.dim() - 1
        _launch_bwd_rows(dy if last else dy.flatten(dim), y if last else y.flatten(dim), dx)
        return dx
    inner = _inner_kernels()
    facts = device_facts(y)
    N = y.shape[dim]
    dy3, y3, dx3 = _around(dy, dim), _around(y, dim), _around(dx, dim)
    K = y3.shape[2]
    config = inner.softmax_inner_config(N, K, y.element_size(), *facts)
    launch(
        inner.softmax_bwd_inner_kernel, y3.shape[0] * -(-K // config.block_m), y, dy3, y3, dx3, N, K,
        **_strides("dy", dy3), **_strides("y", y3), **_strides("dx", dx3),
        BLOCK_N=config.block_n, BLOCK_K=config.block_m, num_warps=config.num_warps,
    )  # fmt: skip
    return dx


def _is_last(x: Tensor, dim: int) -> bool:
    """Whether dim is the last dimension, but for dimensions of size 1 behind it."""
    return math.prod(x.shape[dim + 1 :]) == 1


def _around(x: Tensor, dim: int) -> Tensor:
    """x as (outer, N, inner): a view where the dimensions on each side of dim collapse, else one copy."""
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": stride for axis, stride in zip("onk", x.stride())}


def _launch_fwd_rows(x: Tensor, y: Tensor) -> None:
    """Launch the forward that fits: x of rows in its last dimension, y of as many elements, contiguous."""
    rows, M, stride_xm, stride_xn = rows_and_strides(x)
    facts = (M, x.shape[-1], stride_xm, stride_xn, x.dtype, y.dtype, x.get_device())
    launch_planned(_fwd_plan(*facts), rows, y)


@plan
def _fwd_plan(
    M: int, N: int, stride_xm: int, stride_xn: int, dtype: torch.dtype, out_dtype: torch.dtype, device: int
) -> Planned:
    """The launch of the forward over rows."""
    rows, packed, cluster, row_vectors, measured, clusters_wanted = _row_kernels()
    itemsize = min(dtype.itemsize, out_dtype.itemsize)
    vec, edges, same = row_vectors(N, itemsize, stride_xn, (stride_xm, N))
    packable = dtype is out_dtype and itemsize == 2 and vec > 1 and same
    config = measured("softmax_fwd", M, N, itemsize, device, packable)
    config = config or rows.softmax_fwd_config(M, N, itemsize, *facts_of(device), packable, clusters_wanted(device))
    options = {
        "stride_xm": stride_xm, "stride_ym": N, "VEC": vec, "EDGES": edges,
        "BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.num_ctas > 1:
        options["num_ctas"] = config.num_ctas
    if config.variant == "packed":
        options |= {"BF16": dtype is torch.bfloat16, "ASM": not interpreting()}
        return Planned(device, packed.softmax_fwd_packed_kernel, M, (N,), options)
    options |= {"stride_xn": stride_xn, "SAME": same}
    if config.num_ctas > 1:
        return Planned(device, cluster.softmax_fwd_cluster_kernel, M, (N,), options)
    if config.variant == "chunked":
        return Planned(device, rows.softmax_fwd_chunked_kernel, M, (N,), options)
    return Planned(device, rows.softmax_fwd_kernel, -(-M // config.block_m), (M, N), {**options, "BLOCK_M": config.block_m})


def _launch_bwd_rows(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    """Launch the backward that fits: dy, y of rows in their last dimension, dx of as many elements, contiguous."""
    dy_rows, M, stride_dym, stride_dyn = rows_and_strides(dy)
    y_rows, _, stride_ym, stride_yn = rows_and_strides(y)
    strides = (stride_dym, stride_dyn, stride_ym, stride_yn)
    planned = _bwd_plan(M, y.shape[-1], *strides, dy.dtype, y.dtype, dx.dtype, y.get_device())
    launch_planned(planned, dy_rows, y_rows, dx)


@plan
def _bwd_plan(
    M: int, N: int, stride_dym: int, stride_dyn: int, stride_ym: int, stride_yn: int,
    dy_dtype: torch.dtype, y_dtype: torch.dtype, dx_dtype: torch.dtype, device: int,
) -> Planned:  # fmt: skip
    """The launch of the backward over rows."""
    rows, packed, cluster, row_vectors, measured, clusters_wanted = _row_kernels()
    itemsize = min(dy_dtype.itemsize, y_dtype.itemsize, dx_dtype.itemsize)
    vec, edges, same = row_vectors(N, itemsize, 1 if stride_dyn == stride_yn == 1 else 0, (stride_dym, stride_ym, N))
    if edges and not same:
        vec, edges = 1, False
    packable = dy_dtype is y_dtype is dx_dtype and itemsize == 2 and vec > 1
    config = measured("softmax_bwd", M, N, itemsize, device, packable)
    config = config or rows.softmax_bwd_config(M, N, itemsize, *facts_of(device), packable, clusters_wanted(device))
    options = {
        "stride_dym": stride_dym, "stride_ym": stride_ym, "stride_dxm": N, "VEC": vec, "EDGES": edges,
        "BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.num_ctas > 1:
        options["num_ctas"] = config.num_ctas
    if config.variant == "packed":
        options |= {"BF16": y_dtype is torch.bfloat16, "ASM": not interpreting()}
        return Planned(device, packed.softmax_bwd_packed_kernel, M, (N,), options)
    options |= {"stride_dyn": stride_dyn, "stride_yn": stride_yn, "SAME": same}
    if config.num_ctas > 1:
        return Planned(device, cluster.softmax_bwd_cluster_kernel, M, (N,), options)
    if config.variant == "chunked":
        return Planned(device, rows.softmax_bwd_chunked_kernel, M, (N,), options)
    return Planned(device, rows.softmax_bwd_kernel, -(-M // config.block_m), (M, N), {**options, "BLOCK_M": config.block_m})


def _forward(run: Any, ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    y: Tensor = run(x, dim, dtype)
    ctx.save_for_backward(y)
    ctx.options = dim, dtype and x.dtype
    return y


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return _forward(_FWD, ctx, x, dim, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        dim, dtype = ctx.options
        dtype = dtype or y.dtype
        if torch.is_grad_enabled():  # create_graph=True: y has its own history, through which the second order goes
            wide = torch.float64 if y.dtype is torch.float64 else torch.float32
            product = dy.to(wide) * y.to(wide)
            return (product - y * product.sum(dim, keepdim=True)).to(dtype), None, None
        return _BWD(dy, y, dim, dtype), None, None


def fused_softmax(input: Tensor, dim: int = -1, *, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Softmax over one dimension, as torch.nn.functional.softmax, in one fused kernel.

    y = exp(x - max(x)) / sum(exp(x - max(x))) over dim.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64, or any other real dtype when dtype is given.
        dim: the dimension that sums to 1; negative counts from the end.
        dtype: the result's float dtype, or None for input's. The conversion is part of the kernel.

    Returns:
        A contiguous tensor of input's shape, in dtype. Under CUDA autocast and with no dtype: float32, as torch's.

    Raises:
        IndexError: dim out of range.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    Computed in fp32. A row that holds NaN or +inf, or only -inf, gives NaN, as torch's. Differentiable twice.
    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (rows beyond the registers).
    """
    way = short_way(input)
    if way and dtype is None and input.dtype in FLOATS and type(dim) is int:
        if way == "aten":
            try:
                return _RUN[way](input, dim, None)
            except Exception:  # what ATen refuses is refused below, in our words
                pass
        elif -(rank := input.dim()) <= dim < rank:
            return _RUN[way](input, dim % rank, None)
    return _fused_softmax(input, dim, dtype)


def _fused_softmax(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    op = "fused_softmax"
    if has_torch_function_unary(input):
        return handle_torch_function(fused_softmax, (input,), input, dim, dtype=dtype)
    require_tensor(op, "input", input)
    if dtype is None:
        require_float(op, "input", input)
    elif dtype not in FLOATS:
        refuse(NotImplementedError, op, "dtype", dtype, "torch.float32, float16, bfloat16, float64, or None")
    elif input.is_complex():
        refuse(NotImplementedError, op, "input", input.dtype, "a real dtype")
    dim = normalize_dim(op, dim, input.dim())
    if plain_aten("softmax"):
        return F.softmax(input, dim, dtype=dtype)
    if dtype is None and input.dtype is not torch.float64 and autocasts_to_fp32(input):
        dtype = torch.float32
    if input.requires_grad and torch.is_grad_enabled():
        return _Softmax.apply(input, dim, dtype)
    return _FWD(input, dim, dtype)


# torch.jit.script cannot compile keyword-only arguments: in a script, fused_softmax(x, dim) is ATen's own softmax.
torch.jit._builtins._register_builtin(fused_softmax, "aten::softmax")

SPEC = define(
    OpSpec(
        name="softmax",
        public=fused_softmax,
        torch_fn=F.softmax,
        schema="(Tensor x, int dim, ScalarType? dtype) -> Tensor",
        reference=softmax_reference,
        launch=softmax_launch,
        bound=_cases.softmax.fwd_bound,
        backward=Backward(
            schema="(Tensor dy, Tensor y, int dim, ScalarType dtype) -> Tensor",
            reference=softmax_bwd_reference,
            launch=softmax_bwd_launch,
            bound=_cases.softmax.bwd_bound,
        ),
        samples=_cases.softmax.samples,
        errors=_cases.softmax.errors,
        bench=_cases.softmax.BENCH,
        audit=_cases.softmax.audit,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_RUN = implementations("softmax_fwd", torch.softmax, softmax_launch)
_RUN |= short_applies(_Softmax, _forward, _RUN)
