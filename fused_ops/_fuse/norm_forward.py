"""The forward of a norm that fuse knows by its formula: the fused function in the calls for which the formula holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch.arguments import ordinary
from .._torch.spec import REGISTRY
from .conditions import takes
from .norm_formula import NormFormula


def norm_forward(original: Callable[..., Any], formula: NormFormula, helpers: Mapping[str, Any]) -> Callable[..., Any]:
    """A forward that computes by formula's op, or by original where the call or the module is not what formula is of.

    helpers: the methods that original calls, by name, as the formula was told from them.
    """
    methods = tuple(helpers.items())
    public = REGISTRY[formula.op].public

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = _only(args, kwargs, formula.input)
        weight = None if formula.weight is None else getattr(self, formula.weight)
        if not (_holds(self, x, weight, formula) and all(_is_own(self, name, method) for name, method in methods)):
            return original(self, *args, **kwargs)
        eps = formula.eps if isinstance(formula.eps, float) else getattr(self, formula.eps)
        return public(x, x.shape[-1:], weight, eps)

    return forward


def _is_own(module: Any, name: str, method: Any) -> bool:
    """Whether a module's method is what its class had when the formula was told."""
    return name not in module.__dict__ and getattr(type(module), name) is method


def _only(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The one argument of a call, or None where there are others."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else kwargs.get(name)


def _holds(module: Any, x: Any, weight: Any, formula: NormFormula) -> bool:
    """Whether formula is what module computes of x: sizes, dtypes, no autocast, and every constant as it was."""
    if not takes(x) or torch.is_autocast_enabled(x.device.type):
        return False
    if weight is not None and not (isinstance(weight, Tensor) and ordinary(weight) and weight.shape == x.shape[-1:]):
        return False
    if (x.dtype, None if weight is None else weight.dtype) not in formula.pairs:
        return False
    return all(getattr(module, name, None) == value for name, value in formula.constants)
