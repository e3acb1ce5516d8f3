"""The two-layer perceptron: fused_mlp, its raw operators, and its SPEC."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..._torch.arguments import require_bool
from ..._torch.autograd import autocasting, gradient_of_saved, needed_gradients, needs_grad, runs_aten, take_saved
from ..._torch.eager import fast_applies, fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Backward, Op, Roles
from .activations import SAVES_OUTPUT, activate, check_activation
from .arguments import H, K, N, Operand, cast_all, check, fits
from .cases import mlp as cases
from .gradients import add, linear_grads, times_derivative
from .linear import linear_backward
from .mlp_launch import infer_launch, mlp_bwd_launch, mlp_launch
from .mlp_reference import infer_reference, mlp_bwd_reference, mlp_eager, mlp_reference

OPERANDS = (
    Operand("weight1", (H, K)), Operand("bias1", (H,), optional=True),
    Operand("weight2", (N, H)), Operand("bias2", (N,), optional=True),
)  # fmt: skip


def _forward(
    run: Any, ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    activation: str, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ctx.set_materialize_grads(False)
    need_dx, need_dw1, need_db1, need_dw2, *_ = ctx.needs_input_grad
    need_dpre = need_dx or need_dw1 or need_db1
    if activation in SAVES_OUTPUT:
        save_pre, save_h = False, need_dw2 or (need_dpre and activation == "relu")
    else:
        save_pre, save_h = need_dpre or (need_dw2 and recompute), need_dw2 and not recompute
    y, pre, h = run(x, weight1, bias1, weight2, bias2, activation, save_pre, save_h)
    ctx.activation, ctx.shapes = activation, (weight1.shape, weight2.shape)
    ctx.save_for_backward(
        x if need_dw1 else None, weight1 if need_dx else None, weight2 if need_dpre else None,
        pre if save_pre else None, h if save_h else None,
    )  # fmt: skip
    return y, pre, h


class _Mlp(torch.autograd.Function):
    """pre and h are outputs hidden from users, as pre is _Linear's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str,
        recompute: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _forward(_FWD, ctx, x, weight1, bias1, weight2, bias2, activation, recompute)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpre: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight1, weight2, pre, h = take_saved(ctx)
        *needs, _, _ = needed_gradients(ctx)
        saved = h if pre is None else pre
        dpre, dh = gradient_of_saved(dpre), gradient_of_saved(dh)
        if torch.is_grad_enabled() or dpre is not None or dh is not None or dy is None:
            dw2 = db2 = None
            if dy is not None:
                hidden = activate(pre, ctx.activation) if h is None and pre is not None else h
                below = any(needs[:3]) and weight2 is not None
                through, dw2, db2 = linear_grads(dy, hidden, weight2, (below, *needs[3:]))
                dh = add(through, dh)
            if dh is not None:
                dpre = add(times_derivative(dh, saved, ctx.activation), dpre)
            return *linear_grads(dpre, x, weight1, needs[:3]), dw2, db2, None, None
        need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
        weight2 = dy.new_empty(()).expand(ctx.shapes[1]) if weight2 is None else weight2  # only its shape is read
        dpre, db1, dw2, db2 = _BWD(
            dy, weight2, dy if saved is None else saved, h, ctx.activation, need_dx or need_dw1, need_db1, need_dw2, need_db2,
        )  # fmt: skip
        del saved, pre, h  # free before dx and dw1 take memory
        dx, dw1, db1 = linear_backward(dpre, x, weight1, ctx.shapes[0], need_dx, need_dw1, False, db1)
        grads = (dx, dw1, db1, dw2, db2)
        return *(grad if need else None for grad, need in zip(grads, needs)), None, None


def fused_mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Optional[Tensor],
    weight2: Tensor,
    bias2: Optional[Tensor],
    activation: Optional[str] = "gelu",
    *,
    recompute: bool = False,
) -> Tensor:
    """A transformer's feed-forward block, with a fused backward.

    y = activation(input @ weight1^T + bias1) @ weight2^T + bias2.

    Args:
        input: (*, K), float32, float16, bfloat16 or float64, any strides.
        weight1: (H, K); bias1: (H,) or None; weight2: (N, H); bias2: (N,) or None; input's dtype, any strides.
        activation: as in fused_linear.
        recompute: keep only the pre-activation for the backward and compute the activation again from it: M * H elements
            less memory from the forward on and at the backward's peak, for one more read and write of them. (relu keeps
            only the activation in either case.)

    Returns:
        (*, N), contiguous, of input's dtype. Under autocast everything is cast to the autocast dtype, as torch's linear.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an unknown activation.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    The two products accumulate in fp32, and the hidden layer between them is rounded to input's dtype. In the backward, the
    epilogue of dy @ weight2 computes the activation's derivative and bias1's gradient before rounding, so the hidden layer's
    gradient is never stored: gradients that are asked for in parts, the input's and then the weights', take dy @ weight2 twice.
    Differentiable twice.

    Where a tensor is nested, or of another library's subclass, torch.nn.functional computes, or refuses it.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return mlp_eager(input, weight1, bias1, weight2, bias2, activation)
    else:
        return _fused_mlp(input, weight1, bias1, weight2, bias2, activation, recompute)


def _fused_mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str | None,
    recompute: bool,
) -> Tensor:
    tensors = (weight1, bias1, weight2, bias2)
    way = fast_path(input, *tensors)
    if way and (recompute is False or recompute is True) and fits(input, OPERANDS, activation, *tensors):
        if way == "aten" or way == "cuda":
            return _INFER[way](input, *tensors, activation or "none")
        return _APPLY[way](input, *tensors, activation or "none", recompute)[0]
    name = "none" if activation is None else activation
    check_activation("fused_mlp", name)
    recompute = require_bool("fused_mlp", "recompute", recompute)
    if overrides(input, *tensors):
        return overridden(SPEC, (input, *tensors), input, *tensors, activation, recompute=recompute)
    autocast = isinstance(input, Tensor) and autocasting(input)
    check("fused_mlp", input, OPERANDS, autocast, *tensors)
    if runs_aten("mlp"):
        return mlp_eager(input, weight1, bias1, weight2, bias2, name)
    if autocast:
        input, *cast = cast_all(input, *tensors)
        tensors = tuple(cast)  # type: ignore[assignment]
    if needs_grad(input, *tensors):
        return _Mlp.apply(input, *tensors, name, recompute)[0]
    return _FWD(input, *tensors, name, False, False)[0]


SPEC = define(
    Op(
        name="mlp",
        public=fused_mlp,
        torch_fn=mlp_eager,
        schema=(
            "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str activation, bool save_pre, bool save_h)"
            " -> (Tensor y, Tensor pre, Tensor h)"
        ),
        reference=mlp_reference,
        launch=mlp_launch,
        bound=cases.fwd_bound,
        roles=Roles("x w b W B - - -", "z y6 y7"),
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor weight2, Tensor saved, Tensor? h, str activation, bool need_dpre, bool need_db1,"
                " bool need_dw2, bool need_db2) -> (Tensor dpre, Tensor db1, Tensor dw2, Tensor db2)"
            ),
            reference=mlp_bwd_reference,
            launch=mlp_bwd_launch,
            bound=cases.bwd_bound,
            roles=Roles("z W y y - - - - -", "y5 b6 W7 B8"),
        ),
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_INFER = implementations("mlp_fwd", infer_reference, infer_launch)
_APPLY = fast_applies(_Mlp, _forward, implementations("mlp_fwd", mlp_reference, mlp_launch))
