"""The gated linear: fused_gated_linear, its raw operators, and its SPEC."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _cases
from ._activations import activate, activation_derivative
from ._autograd import autocasting, hidden_grad, plain_aten
from ._launch import KERNEL_DTYPES, rows_of
from ._linear_checks import cast_all, check_gated_linear
from ._matmul import product
from ._matmul_gated import gate_bwd, matmul_gated, product_sum
from ._matmul_grads import add, linear_grads, times_derivative
from ._matmul_plan import fp32_on_cublas
from ._spec import Backward, OpSpec, define


def gated_linear_plain(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    activation: Optional[str] = "silu",
    b_gate: Optional[Tensor] = None,
    b_up: Optional[Tensor] = None,
) -> Tensor:
    """What fused_gated_linear computes, as PyTorch users write it today."""
    if activation is None:
        activation = "none"
    return activate(F.linear(x, w_gate, b_gate), activation) * F.linear(x, w_up, b_up)


def gated_linear_reference(
    x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, u) in ATen. x (..., K), weights (N, K), biases (N,); y, g, u (..., N) as x; g, u empty unless save_pre."""
    g = F.linear(x, w_gate, b_gate).contiguous()
    u = F.linear(x, w_up, b_up).contiguous()
    y = activate(g, activation) * u
    return (y, g, u) if save_pre else (y, x.new_empty((0,)), x.new_empty((0,)))


def gated_linear_launch(
    x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """gated_linear_reference by one kernel. fp32 on a GPU: cuBLAS, which reads x twice and still wins."""
    if x.dtype not in KERNEL_DTYPES or fp32_on_cublas(x):
        return gated_linear_reference(x, w_gate, w_up, b_gate, b_up, activation, save_pre)
    N, K = w_gate.shape
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    g = torch.empty_like(y) if save_pre else x.new_empty((0,))
    u = torch.empty_like(y) if save_pre else x.new_empty((0,))
    x2 = rows_of(x) if K else x.new_empty((math.prod(x.shape[:-1]), 0))
    matmul_gated(x2, w_gate, w_up, b_gate, b_up, y, g, u, activation, save_pre)
    return y, g, u


def gated_linear_bwd_reference(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, g: Tensor, u: Tensor, activation: str,
    need_dx: bool, need_dwg: bool, need_dwu: bool, need_dbg: bool, need_dbu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dwg, dwu, dbg, dbu) in ATen; a gradient not needed is an empty tensor. x is read for dwg and dwu only."""
    N, K = w_gate.shape
    M = math.prod(dy.shape[:-1])
    wide = torch.float64 if dy.dtype is torch.float64 else torch.float32
    rows, G, U = (t.reshape(M, N).to(wide) for t in (dy, g, u))
    dg = rows * U * activation_derivative(G, activation)
    du = rows * activate(G, activation)
    none = dy.new_empty((0,))
    low_g, low_u = dg.to(dy.dtype), du.to(dy.dtype)
    dx = none
    if need_dx:
        both = low_g.to(wide) @ w_gate.to(wide) + low_u.to(wide) @ w_up.to(wide)
        dx = both.to(dy.dtype).reshape((*dy.shape[:-1], K)).contiguous()
    x2 = x.reshape(M, K) if need_dwg or need_dwu else none
    return (
        dx,
        (low_g.t() @ x2).contiguous() if need_dwg else none,
        (low_u.t() @ x2).contiguous() if need_dwu else none,
        dg.sum(0).to(dy.dtype) if need_dbg else none,
        du.sum(0).to(dy.dtype) if need_dbu else none,
    )


def gated_linear_bwd_launch(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, g: Tensor, u: Tensor, activation: str,
    need_dx: bool, need_dwg: bool, need_dwu: bool, need_dbg: bool, need_dbu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """gated_linear_bwd_reference by kernels: one for dg, du and the partial sums of the biases' gradients, one that adds
    dx's two products before rounding, and a product a weight."""
    N, K = w_gate.shape
    if dy.dtype not in KERNEL_DTYPES or dy.numel() == 0 or K == 0:
        needs = (need_dx, need_dwg, need_dwu, need_dbg, need_dbu)
        return gated_linear_bwd_reference(dy, x, w_gate, w_up, g, u, activation, *needs)
    none = dy.new_empty((0,))
    dg, du, dbg, dbu = gate_bwd(rows_of(dy), g, u, activation, need_dbg, need_dbu)
    dx = torch.empty((*dy.shape[:-1], K), dtype=dy.dtype, device=dy.device) if need_dx else none
    dwg = torch.empty((N, K), dtype=dy.dtype, device=dy.device) if need_dwg else none
    dwu = torch.empty((N, K), dtype=dy.dtype, device=dy.device) if need_dwu else none
    if need_dx:
        product_sum(dg, w_gate, du, w_up, dx.view(-1, K))
    if need_dwg:
        product(dg.t(), rows_of(x), dwg)
    if need_dwu:
        product(du.t(), rows_of(x), dwu)
    return dx, dwg, dwu, dbg, dbu


class _GatedLinear(torch.autograd.Function):
    """g and u are outputs hidden from users, as pre is _Linear's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.activation, ctx.weight_shape = activation, w_gate.shape
        y, g, u = _FWD(x, w_gate, w_up, b_gate, b_up, activation, True)
        need_dx, need_dwg, need_dwu, *_ = ctx.needs_input_grad
        weights = (w_gate, w_up) if need_dx else (None, None)
        ctx.save_for_backward(x if need_dwg or need_dwu else None, *weights, g, u)
        return y, g, u

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dg: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_gate, w_up, g, u = ctx.saved_tensors
        dg, du = hidden_grad(dg), hidden_grad(du)
        *needs, _ = ctx.needs_input_grad
        need_dx, need_dwg, need_dwu, need_dbg, need_dbu = needs
        if torch.is_grad_enabled() or dg is not None or du is not None or dy is None:
            if dy is not None:
                dg = add(times_derivative(dy * u, g, ctx.activation), dg)
                du = add(dy * activate(g, ctx.activation), du)
            dxg, dwg, dbg = linear_grads(dg, x, w_gate, (need_dx, need_dwg, need_dbg))
            dxu, dwu, dbu = linear_grads(du, x, w_up, (need_dx, need_dwu, need_dbu))
            return add(dxg, dxu), dwg, dwu, dbg, dbu, None
        shape = dy.new_empty(()).expand(ctx.weight_shape)  # stands for weights of which only the shape is read
        weights = (w_gate, w_up) if need_dx else (shape, shape)
        grads = _BWD(dy, dy if x is None else x, *weights, g, u, ctx.activation, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None


def fused_gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    activation: Optional[str] = "silu",
    b_gate: Optional[Tensor] = None,
    b_up: Optional[Tensor] = None,
) -> Tensor:
    """activation(x @ w_gate^T + b_gate) * (x @ w_up^T + b_up) in one kernel: SwiGLU, GeGLU and their kin.

    Args:
        x: (*, K), float32, float16, bfloat16 or float64, any strides.
        w_gate, w_up: (N, K), x's dtype; any strides.
        activation: of the gate, as in fused_linear; None for a bilinear layer.
        b_gate, b_up: (N,), x's dtype; or None.

    Returns:
        (*, N), contiguous, of x's dtype. Under autocast everything is cast to the autocast dtype, as torch's linear.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an unknown activation.
        NotImplementedError (a RuntimeError): a dtype that is no float.
        TypeError: an argument of the wrong type.

    x is read once for both products; both accumulate in fp32, and the gate is applied before rounding. For the backward
    the two pre-activations are kept, rounded to x's dtype, and x only where a weight needs a gradient: eager keeps the
    activated gate as well. Differentiable twice. Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return gated_linear_plain(x, w_gate, w_up, activation, b_gate, b_up)
    else:
        return _fused_gated_linear(x, w_gate, w_up, activation, b_gate, b_up)


def _fused_gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str | None, b_gate: Tensor | None, b_up: Tensor | None
) -> Tensor:
    tensors = (x, w_gate, w_up, b_gate, b_up)
    if has_torch_function_variadic(*tensors):
        overridable = tuple(t for t in tensors if t is not None)
        return handle_torch_function(fused_gated_linear, overridable, x, w_gate, w_up, activation, b_gate, b_up)
    name = "none" if activation is None else activation
    autocast = isinstance(x, Tensor) and autocasting(x)
    check_gated_linear(x, w_gate, w_up, name, b_gate, b_up, autocast)
    if plain_aten("gated_linear"):
        return gated_linear_plain(x, w_gate, w_up, name, b_gate, b_up)
    if autocast:
        x, w_gate, w_up, b_gate, b_up = cast_all(x, w_gate, w_up, b_gate, b_up)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w_gate, w_up, b_gate, b_up)):
        return _GatedLinear.apply(x, w_gate, w_up, b_gate, b_up, name)[0]
    return _FWD(x, w_gate, w_up, b_gate, b_up, name, False)[0]


SPEC = define(
    OpSpec(
        name="gated_linear",
        public=fused_gated_linear,
        torch_fn=gated_linear_plain,
        schema=(
            "(Tensor x, Tensor w_gate, Tensor w_up, Tensor? b_gate, Tensor? b_up, str activation, bool save_pre)"
            " -> (Tensor y, Tensor g, Tensor u)"
        ),
        reference=gated_linear_reference,
        launch=gated_linear_launch,
        bound=_cases.gated_linear.fwd_bound,
        backward=Backward(
            schema=(
                "(Tensor dy, Tensor x, Tensor w_gate, Tensor w_up, Tensor g, Tensor u, str activation, bool need_dx,"
                " bool need_dwg, bool need_dwu, bool need_dbg, bool need_dbu)"
                " -> (Tensor dx, Tensor dwg, Tensor dwu, Tensor dbg, Tensor dbu)"
            ),
            reference=gated_linear_bwd_reference,
            launch=gated_linear_bwd_launch,
            bound=_cases.gated_linear.bwd_bound,
        ),
        samples=_cases.gated_linear.samples,
        errors=_cases.gated_linear.errors,
        bench=_cases.gated_linear.BENCH,
        audit=_cases.gated_linear.audit,
    )
)
_FWD, _BWD = SPEC.fwd, SPEC.bwd
