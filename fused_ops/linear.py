"""Linear with bias and activation: fused_linear, its raw operators, and its SPEC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _cases
from ._activations import ACTIVATIONS, SAVES_OUTPUT, activate, activation_derivative
from ._autograd import FLOATS, autocasting, hidden_grad, plain_aten, take_saved
from ._backend import NO_FP64, note_fallback
from ._direct import implementations, short_applies, short_way
from ._launch import KERNEL_DTYPES, rows_of
from ._linear_checks import cast_all, check_linear, fits_linear
from ._matmul import act_bwd, matmul, matmul_epilogue, product
from ._matmul_grads import add, linear_grads, times_derivative
from ._matmul_plan import linear_plan
from ._spec import Backward, OpSpec, define

__all__ = ["ACTIVATIONS", "SPEC", "activation_derivative", "fused_linear", "linear_plain", "linear_plan"]


def linear_plain(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, activation: Optional[str] = None) -> Tensor:
    """What fused_linear computes, as PyTorch users write it today: act(F.linear(input, weight, bias))."""
    if activation is None:
        activation = "none"
    return activate(F.linear(input, weight, bias), activation)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    """(y, pre) in ATen. x (..., K), weight (N, K), bias (N,); y, pre (..., N) as x; pre is empty unless save_pre."""
    pre = F.linear(x, weight, bias).contiguous()
    if not save_pre:
        return ACTIVATIONS[activation](pre), x.new_empty((0,))
    y = ACTIVATIONS[activation](pre)
    return y.clone() if y is pre else y, pre


def linear_launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    """linear_reference by what linear_plan says: one Triton kernel (two for small M), or cuBLAS and an epilogue."""
    if x.dtype not in KERNEL_DTYPES:
        note_fallback("linear", NO_FP64)
        return linear_reference(x, weight, bias, activation, save_pre)
    N, K = weight.shape
    none = x.new_empty((0,))
    x2 = rows_of(x) if K else x.new_empty((math.prod(x.shape[:-1]), 0))
    plan = linear_plan(x2, weight, activation, save_pre)
    if plan.backend == "cublas" and activation == "none" and not save_pre:
        return F.linear(x, weight, bias).contiguous(), none
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if save_pre else none
    if y.numel() == 0:
        return y, pre
    if plan.backend == "cublas":
        product = pre if save_pre else y
        torch.mm(x2, weight.t(), out=product.view(-1, N))
        matmul_epilogue(product, bias, y, activation)
    else:
        matmul(x2, weight, bias, y, pre, activation, save_pre)
    return y, pre


def _infer_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """linear_reference's y alone."""
    pre = F.linear(x, weight, bias).contiguous()
    return pre if activation is None or activation == "none" else ACTIVATIONS[activation](pre)


def _train_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """linear_reference with None for a pre-activation that is not saved: an empty tensor would take 1 µs."""
    return (
        linear_reference(x, weight, bias, activation, True)
        if save_pre
        else (_infer_reference(x, weight, bias, activation), None)
    )


def _infer_launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return linear_launch(x, weight, bias, activation, False)[0]


def linear_bwd_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor, activation: str, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db) in ATen; saved is the pre-activation, or y for relu. A gradient not needed is an empty tensor.

    x is read for dw only: without need_dw it may be any tensor. The first of two steps, the activation's, has no weight:
    then dx is the pre-activation's gradient (..., N), and there is no dw.
    """
    N, K = (dy.shape[-1],) * 2 if weight is None else weight.shape
    M = math.prod(dy.shape[:-1])
    wide = torch.float64 if dy.dtype is torch.float64 else torch.float32
    dpre = dy.reshape(M, N).to(wide)
    if activation != "none":
        dpre = dpre * activation_derivative(saved.reshape(M, N).to(wide), activation)
    low = dpre.to(dy.dtype)
    back = low if weight is None else low @ weight
    dx = back.reshape((*dy.shape[:-1], K)).contiguous() if need_dx else dy.new_empty((0,))
    dw = (low.t() @ x.reshape(M, K)).contiguous() if need_dw else dy.new_empty((0,))
    db = dpre.sum(0).to(dy.dtype) if need_db else dy.new_empty((0,))
    return dx, dw, db


def linear_bwd_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor, activation: str, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_bwd_reference by kernels: one for dpre and the partial sums of db, then one product a gradient."""
    N, K = (dy.shape[-1],) * 2 if weight is None else weight.shape
    if dy.dtype not in KERNEL_DTYPES or dy.numel() == 0 or K == 0:
        return linear_bwd_reference(dy, x, weight, saved, activation, need_dx, need_dw, need_db)
    dpre = rows_of(dy)
    db = dy.new_empty((0,))
    if need_db or activation != "none":
        dpre, db = act_bwd(dpre, saved, activation, need_dx or need_dw, need_db)
    if weight is None:
        return dpre.view(dy.shape) if need_dx else dy.new_empty((0,)), dy.new_empty((0,)), db
    dx = torch.empty((*dy.shape[:-1], K), dtype=dy.dtype, device=dy.device) if need_dx else dy.new_empty((0,))
    dw = torch.empty((N, K), dtype=dy.dtype, device=dy.device) if need_dw else dy.new_empty((0,))
    if need_dx:
        product(dpre, weight, dx.view(-1, K))
    if need_dw:
        product(dpre.t(), rows_of(x), dw)
    return dx, dw, db


def _forward(
    run: Any, ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    save_pre = activation not in SAVES_OUTPUT
    y, pre = run(x, weight, bias, activation, save_pre)
    need_dx, need_dw, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        x if need_dw else None, weight if need_dx else None, pre if save_pre else y if activation == "relu" else None,
    )  # fmt: skip
    if not need_dx:
        ctx.weight_shape = weight.shape
    return y, pre


class _Linear(torch.autograd.Function):
    """pre is a second output, hidden from users: a backward that is itself differentiated reaches x through it, so x is
    kept for dw only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
        return _forward(_FWD, ctx, x, weight, bias, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpre: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, saved = take_saved(ctx)
        dpre = hidden_grad(dpre)
        need_dx, need_dw, need_db, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or dpre is not None or dy is None:
            dpre = add(None if dy is None else times_derivative(dy, saved, ctx.activation), dpre)
            return *linear_grads(dpre, x, weight, ctx.needs_input_grad[:3]), None
        db = None
        if ctx.activation != "none":  # a step of its own: what was saved for it is free before dx and dw take memory
            dy, _, db = _BWD(dy, dy, None, saved, ctx.activation, need_dx or need_dw, False, need_db)
            del saved
        shape = ctx.weight_shape if weight is None else weight.shape
        dx, dw, db = linear_backward(dy, x, weight, shape, need_dx, need_dw, need_db and db is None, db)
        return dx if need_dx else None, dw if need_dw else None, db if need_db else None, None


def linear_backward(
    dpre: Tensor, x: Tensor | None, weight: Tensor | None, shape: Sequence[int], need_dx: bool, need_dw: bool,
    need_db: bool, db: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x @ weight^T + bias by the raw operator, db as given where it is not needed. x and weight may be
    None where nothing reads them; then only the weight's shape is looked at."""
    if not (need_dx or need_dw or need_db):
        return None, None, db
    w = dpre.new_empty(()).expand(shape) if weight is None else weight
    dx, dw, sum_of_rows = _BWD(dpre, dpre if x is None else x, w, dpre, "none", need_dx, need_dw, need_db)
    return dx, dw, sum_of_rows if need_db else db


def fused_linear(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, activation: Optional[str] = None) -> Tensor:
    """activation(input @ weight^T + bias) in one kernel, as an activation on torch.nn.functional.linear.

    Args:
        input: (*, K), float32, float16, bfloat16 or float64, any strides.
        weight: (N, K), input's dtype; any strides.
        bias: (N,), or (1,) or () which are broadcast; input's dtype; or None.
        activation: None, "relu", "gelu" (erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "silu", "sigmoid",
            "tanh", or "relu2" (relu squared).

    Returns:
        (*, N), contiguous, of input's dtype. Under autocast everything is cast to the autocast dtype, as torch's linear.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an unknown activation.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    Accumulates in fp32, and applies bias and activation before rounding. fp32 products follow
    torch.backends.cuda.matmul's TF32 setting. The pre-activation is stored only when a gradient needs it. Differentiable twice.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return linear_plain(input, weight, bias, activation)
    else:
        return _fused_linear(input, weight, bias, activation)


def _fused_linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    way = short_way(input, weight, bias)
    if way == "aten":
        if input.dtype in FLOATS and (bias is None or bias.dim() == 1):
            try:
                return _INFER[way](input, weight, bias, activation)
            except Exception:  # what ATen refuses is refused below, in our words
                pass
    elif way and fits_linear(input, weight, bias) and (activation is None or activation in ACTIVATIONS):
        if way == "cuda":
            return _INFER[way](input, weight, bias, activation or "none")
        return _APPLY[way](input, weight, bias, activation or "none")[0]
    if has_torch_function_variadic(input, weight, bias):
        overridable = tuple(t for t in (input, weight, bias) if t is not None)
        return handle_torch_function(fused_linear, overridable, input, weight, bias, activation)
    name = "none" if activation is None else activation
    autocast = isinstance(input, Tensor) and autocasting(input)
    check_linear(input, weight, bias, name, autocast)
    if plain_aten("linear"):
        return linear_plain(input, weight, bias, name)
    if autocast:
        input, weight, bias = cast_all(input, weight, bias)
    if weight.dim() == 1:  # as F.linear: the last dimension goes
        return _fused_linear(input, weight.unsqueeze(0), bias, activation).squeeze(-1)
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.expand(weight.shape[0])
    if _needs_grad(input, weight, bias):
        return _Linear.apply(input, weight, bias, name)[0]
    return _FWD(input, weight, bias, name, False)[0]


def _needs_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )  # fmt: skip


SPEC = define(
    OpSpec(
        name="linear",
        public=fused_linear,
        torch_fn=linear_plain,
        schema="(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_pre) -> (Tensor y, Tensor pre)",
        reference=linear_reference,
        launch=linear_launch,
        bound=_cases.linear.fwd_bound,
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor x, Tensor? weight, Tensor saved, str activation, bool need_dx, bool need_dw,"
                " bool need_db) -> (Tensor dx, Tensor dw, Tensor db)"
            ),
            reference=linear_bwd_reference,
            launch=linear_bwd_launch,
            bound=_cases.linear.bwd_bound,
        ),
        samples=_cases.linear.samples,
        errors=_cases.linear.errors,
        bench=_cases.linear.BENCH,
        audit=_cases.linear.audit,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_INFER = implementations("linear_fwd", _infer_reference, _infer_launch)
_APPLY = short_applies(_Linear, _forward, implementations("linear_fwd", _train_reference, linear_launch))
