"""The two-layer perceptron: fused_mlp, its raw operators, and its SPEC."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _cases
from ._activations import SAVES_OUTPUT, activate, activation_derivative
from ._autograd import autocasting, hidden_grad, plain_aten, take_saved
from ._launch import KERNEL_DTYPES, column_sum, rows_of
from ._linear_checks import cast_all, check_mlp
from ._matmul import act_bwd, activated, matmul_dact, product
from ._matmul_grads import add, linear_grads, times_derivative
from ._matmul_plan import fp32_on_cublas
from ._spec import Backward, OpSpec, define
from .linear import linear_backward, linear_launch, linear_reference


def mlp_plain(
    x: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    activation: Optional[str] = "gelu",
    *,
    recompute: bool = False,
) -> Tensor:
    """What fused_mlp computes, as PyTorch users write it today."""
    if activation is None:
        activation = "none"
    return F.linear(activate(F.linear(x, w1, b1), activation), w2, b2)


def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, save_pre: bool, save_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, pre, h) in ATen. x (..., K), w1 (H, K), w2 (N, H); y (..., N), pre, h (..., H), each empty unless saved."""
    h, pre = linear_reference(x, w1, b1, activation, save_pre)
    y = F.linear(h, w2, b2).contiguous()
    return y, pre, h if save_h else x.new_empty((0,))


def mlp_launch(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, save_pre: bool, save_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """mlp_reference by two launches of fused_linear's kernels."""
    h, pre = linear_launch(x, w1, b1, activation, save_pre)
    y, _ = linear_launch(h, w2, b2, "none", False)
    return y, pre, h if save_h else x.new_empty((0,))


def mlp_bwd_reference(
    dy: Tensor, w2: Tensor, saved: Tensor, h: Tensor, activation: str,
    need_dpre: bool, need_db1: bool, need_dw2: bool, need_db2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dpre, db1, dw2, db2) in ATen: all but the first layer's products, which are fused_linear's. dpre (..., H) is the
    pre-activation's gradient. A gradient not needed is an empty tensor.

    saved (..., H) is the pre-activation, or h for relu; any tensor where the activation is none. h may be empty: then it is
    computed again from saved.
    """
    (N, H), M = w2.shape, math.prod(dy.shape[:-1])
    wide = torch.float64 if dy.dtype is torch.float64 else torch.float32
    rows, none = dy.reshape(M, N), dy.new_empty((0,))
    dpre = db1 = dw2 = db2 = none
    if need_dpre or need_db1:
        gradient = rows.to(wide) @ w2.to(wide)
        if activation != "none":
            gradient = gradient * activation_derivative(saved.reshape(M, H).to(wide), activation)
        dpre = gradient.to(dy.dtype).reshape((*dy.shape[:-1], H)).contiguous() if need_dpre else none
        db1 = gradient.sum(0).to(dy.dtype) if need_db1 else none
    if need_dw2:
        hidden = h.reshape(M, H) if h.numel() == M * H else activate(saved.reshape(M, H), activation)
        dw2 = (rows.t() @ hidden).contiguous()
    if need_db2:
        db2 = rows.to(wide).sum(0).to(dy.dtype)
    return dpre, db1, dw2, db2


def mlp_bwd_launch(
    dy: Tensor, w2: Tensor, saved: Tensor, h: Tensor, activation: str,
    need_dpre: bool, need_db1: bool, need_dw2: bool, need_db2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """mlp_bwd_reference by kernels: dpre and the partial sums of db1 come from the epilogue of the product dy @ w2.

    The order bounds the memory: partial sums are freed before dw2 takes any, and h, where it was dropped and is computed
    again, before dpre does.
    """
    (N, H), M = w2.shape, math.prod(dy.shape[:-1])
    if dy.dtype not in KERNEL_DTYPES or 0 in (M, N, H):
        return mlp_bwd_reference(dy, w2, saved, h, activation, need_dpre, need_db1, need_dw2, need_db2)
    rows, none = rows_of(dy), dy.new_empty((0,))
    dpre = db1 = dw2 = db2 = none

    def weight_gradient(hidden: Tensor) -> Tensor:
        out = torch.empty((N, H), dtype=dy.dtype, device=dy.device)
        product(rows.t(), hidden.reshape(M, H), out)
        return out

    if need_db2:
        _, db2 = act_bwd(rows, rows, "none", False, True)
    stored = h.numel() == M * H
    if need_dw2 and not stored:
        dw2 = weight_gradient(activated(saved.contiguous(), activation))
    if need_dpre or need_db1:
        dpre = torch.empty((*dy.shape[:-1], H), dtype=dy.dtype, device=dy.device)
        db1 = _through_activation(rows, w2, saved, dpre.view(M, H), activation, need_db1)
        dpre = dpre if need_dpre else none
    if need_dw2 and stored:
        dw2 = weight_gradient(h)
    return dpre, db1, dw2, db2


def _through_activation(rows: Tensor, w2: Tensor, saved: Tensor, dpre: Tensor, activation: str, need_db1: bool) -> Tensor:
    """dpre = (rows @ w2) * act'(saved), written; returns db1, or an empty tensor. fp32 on a GPU: cuBLAS, then in place."""
    if fp32_on_cublas(rows):
        product(rows, w2, dpre)
        return act_bwd(dpre, saved, activation, True, need_db1, in_place=True)[1]
    parts = matmul_dact(rows, w2, saved.contiguous(), dpre, activation, need_db1)
    return column_sum(parts, rows.dtype) if need_db1 else rows.new_empty((0,))


class _Mlp(torch.autograd.Function):
    """pre and h are outputs hidden from users, as pre is _Linear's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, recompute: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        need_dx, need_dw1, need_db1, need_dw2, *_ = ctx.needs_input_grad
        need_dpre = need_dx or need_dw1 or need_db1
        if activation in SAVES_OUTPUT:
            save_pre, save_h = False, need_dw2 or (need_dpre and activation == "relu")
        else:
            save_pre, save_h = need_dpre or (need_dw2 and recompute), need_dw2 and not recompute
        y, pre, h = _FWD(x, w1, b1, w2, b2, activation, save_pre, save_h)
        ctx.activation, ctx.shapes = activation, (w1.shape, w2.shape)
        ctx.save_for_backward(
            x if need_dw1 else None, w1 if need_dx else None, w2 if need_dpre else None,
            pre if save_pre else None, h if save_h else None,
        )  # fmt: skip
        return y, pre, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpre: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w1, w2, pre, h = take_saved(ctx)
        *needs, _, _ = ctx.needs_input_grad
        saved = h if pre is None else pre
        dpre, dh = hidden_grad(dpre), hidden_grad(dh)
        if torch.is_grad_enabled() or dpre is not None or dh is not None or dy is None:
            dw2 = db2 = None
            if dy is not None:
                hidden = activate(pre, ctx.activation) if h is None and pre is not None else h
                through, dw2, db2 = linear_grads(dy, hidden, w2, (w2 is not None, *needs[3:]))
                dh = add(through, dh)
            if dh is not None:
                dpre = add(times_derivative(dh, saved, ctx.activation), dpre)
            return *linear_grads(dpre, x, w1, needs[:3]), dw2, db2, None, None
        need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
        w2 = dy.new_empty(()).expand(ctx.shapes[1]) if w2 is None else w2  # only its shape is read
        dpre, db1, dw2, db2 = _BWD(
            dy, w2, dy if saved is None else saved, dy.new_empty((0,)) if h is None else h, ctx.activation,
            need_dx or need_dw1, need_db1, need_dw2, need_db2,
        )  # fmt: skip
        del saved, pre, h  # free before dx and dw1 take memory
        dx, dw1, db1 = linear_backward(dpre, x, w1, ctx.shapes[0], need_dx, need_dw1, False, db1)
        grads = (dx, dw1, db1, dw2, db2)
        return *(grad if need else None for grad, need in zip(grads, needs)), None, None


def fused_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    activation: Optional[str] = "gelu",
    *,
    recompute: bool = False,
) -> Tensor:
    """activation(x @ w1^T + b1) @ w2^T + b2: a transformer's feed-forward block, with a fused backward.

    Args:
        x: (*, K), float32, float16, bfloat16 or float64, any strides.
        w1: (H, K); b1: (H,) or None; w2: (N, H); b2: (N,) or None; x's dtype, any strides.
        activation: as in fused_linear.
        recompute: keep only the pre-activation for the backward and compute the activation again from it: M * H elements
            less memory from the forward on and at the backward's peak, for one more read and write of them. (relu keeps
            only the activation in either case.)

    Returns:
        (*, N), contiguous, of x's dtype. Under autocast everything is cast to the autocast dtype, as torch's linear.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an unknown activation.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    The hidden layer is rounded to x's dtype between the two products, which accumulate in fp32. In the backward the
    activation's derivative and b1's gradient are computed in the epilogue of dy @ w2, before rounding: the hidden layer's
    gradient is never stored. Differentiable twice.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return mlp_plain(x, w1, b1, w2, b2, activation)
    else:
        return _fused_mlp(x, w1, b1, w2, b2, activation, recompute)


def _fused_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str | None, recompute: bool
) -> Tensor:
    tensors = (x, w1, b1, w2, b2)
    if has_torch_function_variadic(*tensors):
        given = tuple(t for t in tensors if t is not None)
        return handle_torch_function(fused_mlp, given, *tensors, activation, recompute=recompute)
    name = "none" if activation is None else activation
    autocast = isinstance(x, Tensor) and autocasting(x)
    check_mlp(x, w1, b1, w2, b2, name, autocast)
    if plain_aten("mlp"):
        return mlp_plain(x, w1, b1, w2, b2, name)
    if autocast:
        x, w1, b1, w2, b2 = cast_all(x, w1, b1, w2, b2)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2)):
        return _Mlp.apply(x, w1, b1, w2, b2, name, recompute)[0]
    return _FWD(x, w1, b1, w2, b2, name, False, False)[0]


SPEC = define(
    OpSpec(
        name="mlp",
        public=fused_mlp,
        torch_fn=mlp_plain,
        schema=(
            "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save_pre, bool save_h)"
            " -> (Tensor y, Tensor pre, Tensor h)"
        ),
        reference=mlp_reference,
        launch=mlp_launch,
        bound=_cases.mlp.fwd_bound,
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor w2, Tensor saved, Tensor h, str activation, bool need_dpre, bool need_db1,"
                " bool need_dw2, bool need_db2) -> (Tensor dpre, Tensor db1, Tensor dw2, Tensor db2)"
            ),
            reference=mlp_bwd_reference,
            launch=mlp_bwd_launch,
            bound=_cases.mlp.bwd_bound,
        ),
        samples=_cases.mlp.samples,
        errors=_cases.mlp.errors,
        bench=_cases.mlp.BENCH,
        audit=_cases.mlp.audit,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
