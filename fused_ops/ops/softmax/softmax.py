"""Softmax: fused_softmax, its raw operators, and its SPEC."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._runtime.tuned_kernels import Tuned
from ..._torch.arguments import FLOATS, normalize_dim, refuse, require_dtype, require_float, require_tensor
from ..._torch.autograd import autocasts_to_fp32, runs_aten, transformed
from ..._torch.eager import fast_applies, fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Backward, Op, Roles
from .cases import softmax as cases
from .softmax_launch import softmax_bwd_launch, softmax_launch
from .softmax_onnx import softmax_onnx
from .softmax_reference import ONE_CALL, REALS, differentiable_bwd, softmax_bwd_reference, softmax_by_aten, softmax_reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
            return differentiable_bwd(dy, y, dim, dtype), None, None
        return _BWD(dy, y, dim, dtype), None, None


def fused_softmax(input: Tensor, dim: int = -1, *, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Softmax over one dimension, as torch.nn.functional.softmax, in one fused kernel.

    y = exp(x - max(x)) / sum(exp(x - max(x))) over dim.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64, or any other real dtype when dtype is given.
        dim: the dimension that sums to 1; negative counts from the end. As torch's: an int of Python's or numpy's, or a tensor
            of one integer.
        dtype: the result's float dtype, or None for input's. The conversion is part of the kernel; unlike torch's, it comes last.

    Returns:
        A contiguous tensor of input's shape, in dtype. Under CUDA autocast and with no dtype: float32, as torch's.

    Raises:
        IndexError: dim out of range.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        RuntimeError: dim is a tensor whose value is not known, as under torch.func.vmap.
        TypeError: an argument of the wrong type.

    Computed in fp32, or in fp64 where input or dtype is float64, and rounded once; integers are not rounded before. A row that
    holds NaN or +inf, or only -inf, gives NaN, as torch's. Differentiable twice.
    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (rows beyond the registers).

    Where a tensor is nested, or of another library's subclass, torch.nn.functional computes, or refuses it.
    """
    way = fast_path(input)
    if way and dtype is None and input.dtype in FLOATS and type(dim) is int:
        if way == "aten":
            try:
                one_call = input.shape[dim] <= ONE_CALL[input.dtype][dim == -1 or dim == input.ndim - 1]
                if one_call and (input.dtype.itemsize > 2 or not transformed()):
                    return _RUN[way](input, dim, None)
            except Exception:  # what ATen refuses is refused below, in our words
                pass
        elif -(rank := input.dim()) <= dim < rank and not input.is_nested:
            dim %= rank
            if way != "cpu grad" or input.shape[dim] <= ONE_CALL[input.dtype][dim == rank - 1]:
                return _RUN[way](input, dim, None)
    return _fused_softmax(input, dim, dtype)


def _fused_softmax(input: Tensor, dim: Any, dtype: Any) -> Tensor:
    op = "fused_softmax"
    if overrides(input):
        return overridden(SPEC, (input,), input, dim, dtype=dtype)
    require_tensor(op, "input", input)
    if dtype is None:
        require_float(op, "input", input)
    else:
        dtype = torch.float64 if dtype is float else dtype  # as torch's own functions take it
        require_dtype(op, "dtype", dtype, _DTYPES, NotImplementedError, optional=True)
        if input.dtype not in REALS:
            refuse(NotImplementedError, op, "input", input.dtype, "a real dtype of whole bytes")
    dim = normalize_dim(op, dim, input.dim())
    if dtype is None and input.dtype is not torch.float64 and autocasts_to_fp32(input):
        dtype = torch.float32
    if runs_aten("softmax"):
        return softmax_by_aten(input, dim, dtype)
    if input.requires_grad and torch.is_grad_enabled():
        return _Softmax.apply(input, dim, dtype)
    return _FWD(input, dim, dtype)


# torch.jit.script cannot compile keyword-only arguments: in a script, fused_softmax(x, dim) is ATen's own softmax.
torch.jit._builtins._register_builtin(fused_softmax, "aten::softmax")


_SOURCES = ("softmax/softmax", "softmax/softmax_cluster", "softmax/softmax_packed", "softmax/softmax_shared", "shared_rows")
_TUNED = Tuned(_SOURCES, ("one_pass", "chunked", "packed", "shared"), clustered=True)  # forward and backward alike
SPEC = define(
    Op(
        name="softmax",
        public=fused_softmax,
        torch_fn=F.softmax,
        schema="(Tensor x, int dim, ScalarType? dtype) -> Tensor",
        reference=softmax_reference,
        launch=softmax_launch,
        bound=cases.fwd_bound,
        roles=Roles("x - -", "x", dim=1),
        backward=Backward(
            schema="(Tensor dy, Tensor y, int dim, ScalarType dtype) -> Tensor",
            reference=softmax_bwd_reference,
            launch=softmax_bwd_launch,
            bound=cases.bwd_bound,
            roles=Roles("x x - -", "x", dim=2),
            tuned=_TUNED,
        ),
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
        onnx=softmax_onnx,
        module=nn.Softmax,
        tuned=_TUNED,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_RUN = implementations("softmax_fwd", torch.softmax, softmax_launch)


_RUN |= fast_applies(_Softmax, _forward, _RUN)
