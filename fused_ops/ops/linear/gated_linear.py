"""The gated linear: fused_gated_linear, its raw operators, and its SPEC."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..._torch.autograd import autocasting, gradient_of_saved, needed_gradients, needs_grad, runs_aten
from ..._torch.eager import fast_applies, fast_path, implementations
from ..._torch.library import define
from ..._torch.overrides import overridden, overrides
from ..._torch.spec import Backward, Op, Roles
from .activations import activate, check_activation
from .arguments import K, N, Operand, cast_all, check, fits
from .cases import gated_linear as cases
from .gated_linear_launch import gated_linear_bwd_launch, gated_linear_launch, infer_launch
from .gated_linear_reference import (
    gated_linear_bwd_reference,
    gated_linear_eager,
    gated_linear_reference,
    infer_reference,
)
from .gradients import add, linear_grads, times_derivative

OPERANDS = (
    Operand("gate_weight", (N, K)), Operand("up_weight", (N, K)),
    Operand("gate_bias", (N,), optional=True), Operand("up_bias", (N,), optional=True),
)  # fmt: skip


def _forward(
    run: Any, ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.weight_shape = activation, gate_weight.shape
    y, g, u = run(x, gate_weight, up_weight, gate_bias, up_bias, activation, True)
    need_dx, need_dwg, need_dwu, *_ = ctx.needs_input_grad
    weights = (gate_weight, up_weight) if need_dx else (None, None)
    ctx.save_for_backward(x if need_dwg or need_dwu else None, *weights, g, u)
    return y, g, u


class _GatedLinear(torch.autograd.Function):
    """g and u are outputs hidden from users, as pre is _Linear's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _forward(_FWD, ctx, x, gate_weight, up_weight, gate_bias, up_bias, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dg: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate_weight, up_weight, g, u = ctx.saved_tensors
        dg, du = gradient_of_saved(dg), gradient_of_saved(du)
        *needs, _ = needed_gradients(ctx)
        need_dx, need_dwg, need_dwu, need_dbg, need_dbu = needs
        if torch.is_grad_enabled() or dg is not None or du is not None or dy is None:
            if dy is not None:
                dg = add(times_derivative(dy * u, g, ctx.activation), dg)
                du = add(dy * activate(g, ctx.activation), du)
            dxg, dwg, dbg = linear_grads(dg, x, gate_weight, (need_dx, need_dwg, need_dbg))
            dxu, dwu, dbu = linear_grads(du, x, up_weight, (need_dx, need_dwu, need_dbu))
            return add(dxg, dxu), dwg, dwu, dbg, dbu, None
        shape = dy.new_empty(()).expand(ctx.weight_shape)  # stands for weights of which only the shape is read
        weights = (gate_weight, up_weight) if need_dx else (shape, shape)
        grads = _BWD(dy, dy if x is None else x, *weights, g, u, ctx.activation, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None


def fused_gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: Optional[str] = "silu",
    gate_bias: Optional[Tensor] = None,
    up_bias: Optional[Tensor] = None,
) -> Tensor:
    """A gated linear in one kernel, as in SwiGLU and GeGLU.

    y = activation(input @ gate_weight^T + gate_bias) * (input @ up_weight^T + up_bias).

    Args:
        input: (*, K), float32, float16, bfloat16 or float64, any strides.
        gate_weight, up_weight: (N, K), input's dtype; any strides.
        activation: of the gate, as in fused_linear; None for a bilinear layer.
        gate_bias, up_bias: (N,), input's dtype; or None.

    Returns:
        (*, N), contiguous, of input's dtype. Under autocast everything is cast to the autocast dtype, as torch's linear.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an unknown activation.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    Both products accumulate in fp32 from one read of input, and the gate is applied before rounding. For the backward the two
    pre-activations are kept, rounded to input's dtype, and input only where a weight needs a gradient. Eager PyTorch keeps the
    activated gate as well. Differentiable twice. Gradients that are asked for in parts take no product twice. Source: Shazeer, GLU Variants Improve Transformer, 2020.

    Where a tensor is nested, or of another library's subclass, torch.nn.functional computes, or refuses it.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return gated_linear_eager(input, gate_weight, up_weight, activation, gate_bias, up_bias)
    else:
        return _fused_gated_linear(input, gate_weight, up_weight, activation, gate_bias, up_bias)


def _fused_gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
) -> Tensor:
    tensors = (gate_weight, up_weight, gate_bias, up_bias)
    way = fast_path(input, *tensors)
    if way and fits(input, OPERANDS, activation, *tensors):
        if way == "aten" or way == "cuda":
            return _INFER[way](input, *tensors, activation or "none")
        return _APPLY[way](input, *tensors, activation or "none")[0]
    name = "none" if activation is None else activation
    check_activation("fused_gated_linear", name)
    if overrides(input, *tensors):
        return overridden(SPEC, (input, *tensors), input, gate_weight, up_weight, activation, gate_bias, up_bias)
    autocast = isinstance(input, Tensor) and autocasting(input)
    check("fused_gated_linear", input, OPERANDS, autocast, *tensors)
    if runs_aten("gated_linear"):
        return gated_linear_eager(input, gate_weight, up_weight, name, gate_bias, up_bias)
    if autocast:
        input, *cast = cast_all(input, *tensors)
        tensors = tuple(cast)  # type: ignore[assignment]
    if needs_grad(input, *tensors):
        return _GatedLinear.apply(input, *tensors, name)[0]
    return _FWD(input, *tensors, name, False)[0]


SPEC = define(
    Op(
        name="gated_linear",
        public=fused_gated_linear,
        torch_fn=gated_linear_eager,
        schema=(
            "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, str activation, bool save_pre)"
            " -> (Tensor y, Tensor g, Tensor u)"
        ),
        reference=gated_linear_reference,
        launch=gated_linear_launch,
        bound=cases.fwd_bound,
        roles=Roles("x w w b b - -", "y y6 y6"),
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor x, Tensor gate_weight, Tensor up_weight, Tensor g, Tensor u, str activation, bool need_dx,"
                " bool need_dwg, bool need_dwu, bool need_dbg, bool need_dbu)"
                " -> (Tensor dx, Tensor dwg, Tensor dwu, Tensor dbg, Tensor dbu)"
            ),
            reference=gated_linear_bwd_reference,
            launch=gated_linear_bwd_launch,
            bound=cases.bwd_bound,
            roles=Roles("y x w w y y - - - - - -", "x7 w8 w9 b10 b11"),
        ),
        samples=cases.samples,
        errors=cases.errors,
        bench=cases.BENCH,
        audit=cases.audit,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
_INFER = implementations("gated_linear_fwd", infer_reference, infer_launch)
_APPLY = fast_applies(_GatedLinear, _forward, implementations("gated_linear_fwd", gated_linear_reference, gated_linear_launch))
