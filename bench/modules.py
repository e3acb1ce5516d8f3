"""The eager baseline as a torch.nn module, for providers that script it, export it or build an engine from it."""

from __future__ import annotations

import inspect
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
    cls = work.spec.module
    if cls is None and work.op != "linear":
        raise Unsupported(f"no torch.nn module is one {work.op}")
    values = inspect.signature(work.spec.public).bind(*work.args, **work.kwargs).arguments
    with torch.no_grad():
        if cls is not None:
            module = _of_class(cls, values)
        else:
            module = _linear(**{name: value for name, value in values.items() if name != "input"})
    return module.to(device=work.device, dtype=work.case.dtype).eval().requires_grad_(False), work.args[0].detach()


def _of_class(cls: type[nn.Module], values: dict[str, Any]) -> nn.Module:
    """A module of the class that is the op, with the function's arguments: those of the same names, and its parameters."""
    wanted = inspect.signature(cls).parameters
    parameters = {name: values.get(name) for name in ("weight", "bias")}
    options = {name: value for name, value in values.items() if name in wanted and name not in parameters}
    for option, name in (("elementwise_affine", "weight"), ("bias", "bias")):
        if option in wanted:
            options[option] = parameters[name] is not None
    return _load(cls(**options), **parameters)


def _linear(weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> nn.Module:
    linear = _load(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"), weight, bias)
    return linear if activation is None else nn.Sequential(linear, ACTIVATION_MODULES[activation]())


def _load(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, name, nn.Parameter(value.detach().clone()))
    return module
