"""The providers that are measured. Each says whether it can run here, and prepares the call for one case."""

from __future__ import annotations

from ..provider import Prepared, Provider, Unsupported, Workload
from .deployed import OnnxRuntime, TensorRT
from .ours import Ours, OursRecompute
from .peers import FlagGems, Helion, Liger, Quack
from .torch_native import Checkpoint, Compile, CublasLt, Eager, ScaledMM, TorchScript

__all__ = ["PROVIDERS", "Prepared", "Provider", "Unsupported", "Workload", "by_name"]

PROVIDERS: tuple[Provider, ...] = (
    Eager(),
    Checkpoint(),
    Compile("compile", None),
    Liger(),
    Quack(),
    Helion(),
    FlagGems(),
    CublasLt(),
    ScaledMM(),
    TorchScript(),
    OnnxRuntime(),
    TensorRT(),
    Compile("compile-max-autotune", "max-autotune-no-cudagraphs"),
    OursRecompute(),
    Ours(),
)
"""The providers in the order they run: ours last, so that its row has the ratio to the peers measured before."""


def by_name(name: str) -> Provider:
    """The provider of that name."""
    for provider in PROVIDERS:
        if provider.name == name:
            return provider
    raise KeyError(f"no provider {name!r}; there are {[p.name for p in PROVIDERS]}")
