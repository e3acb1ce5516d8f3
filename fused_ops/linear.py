"""Linear with bias and activation: fused_linear, its raw operators, and its SPEC."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _cases
from ._autograd import differentiable_backward, plain_aten
from ._checks import refuse, require_device, require_float, require_tensor
from ._launch import KERNEL_DTYPES, column_sum, device_facts, interpreting, launch, rows_of
from ._spec import Backward, OpSpec, define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(),
}
SAVES_OUTPUT = frozenset(("none", "relu"))  # the backward needs no pre-activation: relu's sign can be read from y


@functools.cache
def _kernels() -> Any:
    from .kernels import linear

    return linear


def linear_plain(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, activation: Optional[str] = None) -> Tensor:
    """What fused_linear computes, as PyTorch users write it today: act(F.linear(input, weight, bias))."""
    pre = F.linear(input, weight, bias)
    if activation is None or activation == "none":
        return pre
    elif activation == "relu":
        return F.relu(pre)
    elif activation == "gelu":
        return F.gelu(pre)
    elif activation == "gelu_tanh":
        return F.gelu(pre, approximate="tanh")
    elif activation == "quick_gelu":
        return pre * torch.sigmoid(1.702 * pre)
    elif activation == "silu":
        return F.silu(pre)
    elif activation == "sigmoid":
        return torch.sigmoid(pre)
    elif activation == "tanh":
        return torch.tanh(pre)
    elif activation == "relu2":
        return F.relu(pre).square()
    else:
        raise RuntimeError("fused_linear: activation: unknown name")


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    """(y, pre) in ATen. x (..., K), weight (N, K), bias (N,); y, pre (..., N) as x; pre is empty unless save_pre."""
    pre = F.linear(x, weight, bias).contiguous()
    if not save_pre:
        return ACTIVATIONS[activation](pre), x.new_empty((0,))
    y = ACTIVATIONS[activation](pre)
    return y.clone() if y is pre else y, pre


def linear_launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    """linear_reference by one Triton kernel."""
    if x.dtype not in KERNEL_DTYPES:
        return linear_reference(x, weight, bias, activation, save_pre)
    N, K = weight.shape
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if save_pre else x.new_empty((0,))
    x2 = x.reshape(-1, K) if K else x.new_empty((y.numel() // max(N, 1), 0))
    matmul(x2, weight, bias, y, pre, activation, save_pre)
    return y, pre


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, pre: Tensor, activation: str, save_pre: bool) -> None:
    """y = act(x @ weight^T + bias) by linear_fwd_kernel. x (M, K), weight (N, K) of any strides; y, pre contiguous."""
    (M, K), N = x.shape, weight.shape[0]
    if M == 0 or N == 0:
        return
    kernels = _kernels()
    config = kernels.linear_config(M, N, K, x.element_size(), *device_facts(x))
    tf32 = x.dtype is torch.float32 and x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    launch(
        kernels.linear_fwd_kernel, -(-M // config.block_m) * -(-N // config.block_n), x,
        x, weight, x if bias is None else bias, y, pre, M, N, K,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
        stride_b=0 if bias is None else bias.stride(0), stride_ym=N,
        ACT=activation, HAS_BIAS=bias is not None, SAVE_PRE=save_pre, PRECISION="tf32" if tf32 else "ieee",
        WIDEN=interpreting() and x.dtype is torch.bfloat16,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def linear_bwd_reference(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db) in ATen; saved is the pre-activation, or y for relu. A gradient not needed is an empty tensor."""
    N, K = weight.shape
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    dpre = dy.reshape(-1, N).to(wide) if N else dy.new_empty((x.numel() // max(K, 1), 0), dtype=wide)
    if activation != "none":
        dpre = dpre * activation_derivative(saved.reshape(dpre.shape).to(wide), activation)
    low = dpre.to(x.dtype)
    x2 = x.reshape(-1, K) if K else x.new_empty((low.shape[0], 0))
    dx = (low @ weight).reshape(x.shape).contiguous() if need_dx else x.new_empty((0,))
    dw = (low.t() @ x2).contiguous() if need_dw else x.new_empty((0,))
    db = dpre.sum(0).to(x.dtype) if need_db else x.new_empty((0,))
    return dx, dw, db


def activation_derivative(x: Tensor, activation: str) -> Tensor:
    """act'(x) in ATen."""
    ones = torch.ones_like(x)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(ones, x, 0)
    if activation in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(ones, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return s + 1.702 * x * s * (1 - s)
    if activation == "silu":
        return torch.ops.aten.silu_backward(ones, x)
    if activation == "sigmoid":
        s = torch.sigmoid(x)
        return s * (1 - s)
    if activation == "tanh":
        return 1 - torch.tanh(x).square()
    if activation == "relu2":
        return 2 * F.relu(x)
    return ones


def linear_bwd_launch(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_bwd_reference by Triton kernels: one for dpre and the partial sums of db, then one matmul a gradient."""
    N, K = weight.shape
    if x.dtype not in KERNEL_DTYPES or dy.numel() == 0 or K == 0:
        return linear_bwd_reference(dy, x, weight, saved, activation, need_dx, need_dw, need_db)
    dpre, x2 = rows_of(dy), rows_of(x)
    db = x.new_empty((0,))
    if need_db or activation != "none":
        dpre, db = _act_bwd(dpre, saved, activation, need_dx or need_dw, need_db, x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else x.new_empty((0,))
    dw = torch.empty((N, K), dtype=x.dtype, device=x.device) if need_dw else x.new_empty((0,))
    if need_dx:
        _product(dpre, weight, dx.view(-1, K))
    if need_dw:
        _product(dpre.t(), x2, dw)
    return dx, dw, db


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b: cuBLAS on a GPU, which has nothing to fuse here; our kernel when interpreting."""
    if a.is_cuda:
        torch.mm(a, b, out=out)
    else:
        matmul(a, b.t(), None, out, out, "none", False)


def _act_bwd(
    dy: Tensor, saved: Tensor, activation: str, need_dpre: bool, need_db: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dpre (M, N) in dtype (dy itself without an activation), and db (N,), by linear_act_bwd_kernel."""
    kernels = _kernels()
    M, N = dy.shape
    _, sms = device_facts(dy)
    rows = kernels.linear_act_bwd_rows(M, N, sms)
    write = need_dpre and activation != "none"
    dpre = torch.empty((M, N), dtype=dtype, device=dy.device) if write else dy
    parts = torch.empty((-(-M // rows), N), dtype=torch.float32, device=dy.device) if need_db else dpre
    launch(
        kernels.linear_act_bwd_kernel, -(-M // rows) * -(-N // kernels.ACT_BWD_BLOCK_N), dy,
        dy, saved, dpre, parts, M, N, rows,
        stride_dym=dy.stride(0), stride_dyn=dy.stride(1), stride_sm=N, stride_dpm=N,
        ACT=activation, NEED_DPRE=write, NEED_DB=need_db,
        BLOCK_M=kernels.ACT_BWD_BLOCK_M, BLOCK_N=kernels.ACT_BWD_BLOCK_N, num_warps=4,
    )  # fmt: skip
    return dpre, column_sum(parts, dtype) if need_db else dy.new_empty((0,))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        save_pre = activation not in SAVES_OUTPUT
        y, pre = _FWD(x, weight, bias, activation, save_pre)
        ctx.save_for_backward(x, weight, bias, pre if save_pre else y if activation == "relu" else None)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_backward(linear_plain, (x, weight, bias, ctx.activation), dy)[:3], None
        need_dx, need_dw, need_db, _ = ctx.needs_input_grad
        dx, dw, db = _BWD(dy, x, weight, dy if saved is None else saved, ctx.activation, need_dx, need_dw, need_db)
        return dx if need_dx else None, dw if need_dw else None, db if need_db else None, None


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
    if has_torch_function_variadic(input, weight, bias):
        overridable = tuple(t for t in (input, weight, bias) if t is not None)
        return handle_torch_function(fused_linear, overridable, input, weight, bias, activation)
    name = "none" if activation is None else activation
    autocast = isinstance(input, Tensor) and torch.is_autocast_enabled(input.device.type)
    _check(input, weight, bias, name, autocast)
    if plain_aten():
        return linear_plain(input, weight, bias, name)
    if autocast and input.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
    if weight.dim() == 1:  # as F.linear: the last dimension goes
        return _fused_linear(input, weight.unsqueeze(0), bias, activation).squeeze(-1)
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.expand(weight.shape[0])
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(input, weight, bias, name)
    return _FWD(input, weight, bias, name, False)[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, autocast: bool) -> None:
    op = "fused_linear"
    require_tensor(op, "input", x)
    require_tensor(op, "weight", weight)
    require_float(op, "input", x)
    if activation not in ACTIVATIONS:
        names = "None, " + ", ".join(repr(a) for a in ACTIVATIONS if a != "none")
        refuse(RuntimeError, op, "activation", repr(activation), names)
    if weight.dim() not in (1, 2):
        refuse(RuntimeError, op, "weight", f"shape {tuple(weight.shape)}", "shape (N, K) or (K,)")
    if x.dim() == 0:
        refuse(RuntimeError, op, "input", "a 0-d tensor", f"shape (*, {weight.shape[-1]})")
    if x.shape[-1] != weight.shape[-1]:
        got = f"shape {tuple(x.shape)}, whose last dimension is {x.shape[-1]}"
        refuse(RuntimeError, op, "input", got, f"last dimension K = {weight.shape[-1]} of weight {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_tensor(op, name, tensor, optional=True)
            require_float(op, name, tensor)
            require_device(op, name, tensor, x.device)
            if tensor.dtype is not x.dtype and not autocast:
                refuse(RuntimeError, op, name, tensor.dtype, f"the dtype of input, {x.dtype}")
    N = weight.shape[0] if weight.dim() == 2 else 1
    if bias is not None and tuple(bias.shape) not in ((N,), (1,), ()):
        refuse(RuntimeError, op, "bias", f"shape {tuple(bias.shape)}", f"shape ({N},)")


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
                "(Tensor dy, Tensor x, Tensor weight, Tensor saved, str activation, bool need_dx, bool need_dw,"
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
