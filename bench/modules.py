"""The eager baseline as a torch.nn module, for providers that script it, export it or build an engine from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .provider import Unsupported, Workload


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ReLU2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


class GeluTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": GeluTanh, "quick_gelu": QuickGELU,
    "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu2": ReLU2,
}  # fmt: skip


def eager_module(work: Workload) -> tuple[nn.Module, Tensor]:
    """(a module of torch.nn that computes what the op's call computes, its input). Parameters are the workload's.

    Raises:
        Unsupported: no torch.nn module computes the op.
    """
    build = _BUILDERS.get(work.op)
    if build is None:
        raise Unsupported(f"no torch.nn module is one {work.op}")
    with torch.no_grad():
        module = build(*work.args, **work.kwargs)
    return module.to(device=work.device, dtype=work.case.dtype).eval().requires_grad_(False), work.args[0].detach()


def _softmax(x: Tensor, dim: int = -1, **_: Any) -> nn.Module:
    return nn.Softmax(dim)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> nn.Module:
    module = nn.LayerNorm(shape, eps, elementwise_affine=weight is not None, bias=bias is not None)
    return _load(module, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> nn.Module:
    linear = _load(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"), weight, bias)
    return linear if activation is None else nn.Sequential(linear, ACTIVATION_MODULES[activation]())


def _load(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, name, nn.Parameter(value.detach().clone()))
    return module


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "softmax": _softmax, "layer_norm": _layer_norm, "linear": _linear,
}  # fmt: skip
