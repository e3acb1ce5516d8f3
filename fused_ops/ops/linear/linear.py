"""Linear with bias and activation: fused_linear, its raw operators, and its SPEC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ..._torch.arguments import FLOATS
from ..._torch.autograd import autocasting, gradient_of_saved, needed_gradients, needs_grad, runs_aten, take_saved
from ..._torch.eager import fast_applies, fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Backward, Op, Roles
from .activations import SAVES_OUTPUT, check_activation
from .arguments import K, N, Operand, cast_all, check, fits
from .cases import linear as cases
from .gradients import add, linear_grads, times_derivative
from .linear_launch import infer_launch, linear_bwd_launch, linear_launch, plan_of
from .linear_onnx import linear_onnx
from .linear_reference import infer_reference, linear_bwd_reference, linear_eager, linear_reference, train_reference

OPERANDS = (Operand("weight", (N, K)), Operand("bias", (N,), optional=True))


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
    """pre, the pre-activation, is a second output that users never see.

    A backward that is itself differentiated reaches x through pre, so x is kept for dw only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
        return _forward(_FWD, ctx, x, weight, bias, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpre: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, saved = take_saved(ctx)
        dpre = gradient_of_saved(dpre)
        need_dx, need_dw, need_db, _ = needs = needed_gradients(ctx)
        if torch.is_grad_enabled() or dpre is not None or dy is None:
            dpre = add(None if dy is None else times_derivative(dy, saved, ctx.activation), dpre)
            return *linear_grads(dpre, x, weight, needs[:3]), None
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
    """(dx, dw, db) of x @ weight^T + bias by the raw operator. db: returned as given where need_db is false.

    x and weight may be None where no gradient needs them; then only shape, the weight's, is used.
    """
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
    Gradients that are asked for in parts (torch.autograd.grad with retain_graph=True) take no product twice.

    Where a tensor is nested, or of another library's subclass, torch.nn.functional computes, or refuses it.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return linear_eager(input, weight, bias, activation)
    else:
        return _fused_linear(input, weight, bias, activation)


def _fused_linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    way = fast_path(input, weight, bias)
    if way == "aten":
        if input.dtype in FLOATS and (bias is None or (bias.dim() == 1 and bias.dtype is input.dtype)):
            try:
                return _INFER[way](input, weight, bias, activation)
            except Exception:  # what ATen refuses is refused below, in our words
                pass
    elif way and fits(input, OPERANDS, activation, weight, bias):
        if way == "cuda":
            return _INFER[way](input, weight, bias, activation or "none")
        return _APPLY[way](input, weight, bias, activation or "none")[0]
    name = "none" if activation is None else activation
    check_activation("fused_linear", name)
    if overrides(input, weight, bias):
        return overridden(SPEC, (input, weight, bias), input, weight, bias, activation)
    if isinstance(weight, Tensor) and weight.dim() == 1:  # as F.linear: the last dimension goes
        return _fused_linear(input, weight.unsqueeze(0), bias, activation).squeeze(-1)
    if isinstance(bias, Tensor) and isinstance(weight, Tensor) and weight.dim() and bias.shape in ((1,), ()):
        bias = bias.expand(weight.shape[0])
    autocast = isinstance(input, Tensor) and autocasting(input)
    check("fused_linear", input, OPERANDS, autocast, weight, bias)
    if runs_aten("linear"):
        return linear_eager(input, weight, bias, name)
    if autocast:
        input, weight, bias = cast_all(input, weight, bias)
    if needs_grad(input, weight, bias):
        return _Linear.apply(input, weight, bias, name)[0]
    return _FWD(input, weight, bias, name, False)[0]


SPEC = define(
    Op(
        name="linear",
        public=fused_linear,
        torch_fn=linear_eager,
        schema="(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_pre) -> (Tensor y, Tensor pre)",
        reference=linear_reference,
        launch=linear_launch,
        bound=cases.fwd_bound,
        roles=Roles("x w b - -", "y y4", sums=cases.sums),
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor x, Tensor? weight, Tensor saved, str activation, bool need_dx, bool need_dw,"
                " bool need_db) -> (Tensor dx, Tensor dw, Tensor db)"
            ),
            reference=linear_bwd_reference,
            launch=linear_bwd_launch,
            bound=cases.bwd_bound,
            roles=cases.bwd_roles,
        ),
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
        reason=lambda *args: plan_of(*args)[0].reason,
        onnx=linear_onnx,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_INFER = implementations("linear_fwd", infer_reference, infer_launch)
_APPLY = fast_applies(_Linear, _forward, implementations("linear_fwd", train_reference, linear_launch))
