"""quack-kernels through its own entry points: softmax, layer norm, and matmuls with an activation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..provider import Unsupported, Workload, missing, needs_cuda
from .library import Library, Table, affine, epsilon, rows_of, weighted

MODULES = ("quack", "quack.rmsnorm", "quack.gemm_interface", "quack.mlp")  # imported before any time is limited


class Quack(Library):
    """quack-kernels, written in CuTe DSL for Hopper and Blackwell; its matmuls in their default configuration.

    Tuned they would be searched for a minute a shape. It multiplies in 16 bits.
    """

    name, module = "quack", "quack"

    def available(self, device: str) -> str:
        if reason := needs_cuda(device):
            return reason
        if reason := missing(*MODULES):
            return reason
        major, minor = torch.cuda.get_device_capability()
        return "" if major >= 9 else f"quack needs compute capability 9.0, this is {major}.{minor}"

    def table(self) -> Table:
        return {
            "softmax": _quack_softmax,
            "layer_norm": _quack_layer_norm,
            "rms_norm": _quack_rms_norm,
            "linear": _quack_linear,
            "gated_linear": _quack_gated,
            "mlp": _quack_mlp,
        }


def _quack_softmax(work: Workload) -> Callable[..., Tensor]:
    rows_of(work, "quack's softmax")
    softmax = importlib.import_module("quack").softmax
    return lambda input, dim=-1, **_: softmax(input)


def _quack_layer_norm(work: Workload) -> Callable[..., Tensor]:
    """quack's layernorm_fwd and layernorm_bwd, which want fp32 parameters: cast once, outside the timing."""
    affine(work, "quack's layer norm")
    rmsnorm = importlib.import_module("quack.rmsnorm")
    weight32, bias32 = (p.detach().float() for p in work.args[2:4])

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            y, rstd, mean = rmsnorm.layernorm_fwd(x, weight32, bias32, eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, rstd, mean = ctx.saved_tensors
            dx, dw, db = rmsnorm.layernorm_bwd(x, weight32, dy, rstd, mean, has_bias=True)
            return dx, dw.to(x.dtype), db.to(x.dtype), None

    if not work.trains:
        return lambda input, shape, weight, bias, eps=1e-5: rmsnorm.layernorm_fwd(input, weight32, bias32, eps)
    return lambda input, shape, weight, bias, eps=1e-5: LayerNorm.apply(input, weight, bias, eps)


def _quack_rms_norm(work: Workload) -> Callable[..., Tensor]:
    """quack's rmsnorm, whose backward is its own."""
    weighted(work, "quack's RMS norm")
    rmsnorm = importlib.import_module("quack.rmsnorm").rmsnorm
    return lambda input, shape, weight, eps=None: rmsnorm(input, weight, eps=epsilon(input, eps))


_QUACK_ACTIVATIONS = {"relu": "relu", "gelu_tanh": "gelu_tanh_approx", "silu": "silu", "relu2": "relu_sq", "tanh": "tanh"}
_QUACK_GATES = {"silu": "swiglu", "gelu_tanh": "geglu", "relu": "reglu", "sigmoid": "glu"}
_QUACK_SAID = "default configuration, not tuned"


def _quack_name(work: Workload, names: dict[str, str], activation: str | None) -> str:
    if work.case.dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported(f"quack multiplies in 16 bits, not {work.case.dtype}")
    if activation not in names:
        raise Unsupported(f"quack fuses no {activation}")
    return names[activation]


def _quack_linear(work: Workload) -> Callable[..., Tensor]:
    """quack's GEMM with activation; its training path exists only inside its MLP."""
    work.inference_only("quack's gemm_act")
    name = _quack_name(work, _QUACK_ACTIVATIONS, work.args[3])
    gemm = importlib.import_module("quack.gemm_interface")

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return gemm.gemm_act(input, weight.t(), bias=bias, activation=name, store_preact=False, tuned=False)[1]

    return call


def _quack_gated(work: Workload) -> Callable[..., Tensor]:
    """quack's GEMM with a gate, which wants gate and up in alternate columns: arranged once, outside the timing."""
    work.inference_only("quack's gemm_gated")
    if any(a is not None for a in work.args[4:]):
        raise Unsupported("quack's gate without biases here")
    name = _quack_name(work, _QUACK_GATES, work.args[3])
    gemm = importlib.import_module("quack.gemm_interface")
    weight = torch.stack(work.args[1:3], 1).flatten(0, 1).detach()
    return lambda input, *_, **__: gemm.gemm_gated(input, weight.t(), activation=name, store_preact=False, tuned=False)[1]


def _quack_mlp(work: Workload) -> Callable[..., Tensor]:
    name = _quack_name(work, _QUACK_ACTIVATIONS, work.args[5])
    mlp = importlib.import_module("quack.mlp")

    def call(input: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
        return mlp.mlp_func(input, w1, w2, name, bias1=b1, bias2=b2, tuned=False)

    return call
