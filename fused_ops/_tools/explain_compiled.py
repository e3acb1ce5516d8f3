"""explain_compiled(function, *args): what torch.compile makes of each of our operators in a function or model, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .._runtime import settings
from .._torch.compile_choice import Choice, noting, register
from .._torch.compile_state import COMPILE_WITH_ATEN


class Choices(tuple[Choice, ...]):
    """The choices of a function's graphs, forward and backward, in their order; prints one a line."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "no operator of ours"

    def as_json(self) -> list[dict[str, Any]]:
        """The choices' fields, JSON-serialisable."""
        return [asdict(choice) | {"shapes": [[str(n) for n in shape] for shape in choice.shapes]} for choice in self]


def explain_compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choices:
    """What torch.compile takes for each raw operator of function(*args, **kwargs): ours or ATen's formula, and both costs.

    Args:
        function: a function or module that calls ours, or that `fuse` changed.
        args, kwargs: as for the call. Where a tensor needs a gradient, the backward is told too.

    Returns:
        Choices, which print as a line an operator: kernels and bytes of it and of what could fuse with it, with our operator and
        with ATen's formula. The function is traced and runs once, uncompiled; no code is generated.
    """
    from torch._inductor import compile_fx, config

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        return compile_fx.compile_fx(graph, example, inner_compile=lambda lowered, _, **__: lowered)

    register()
    with noting() as found, config.patch(force_disable_caches=True, fallback_random=True):
        torch.compile(lambda *a, **k: function(*a, **k), backend=backend)(*args, **kwargs)
    return Choices(found)


def when_compiled(op: str) -> str:
    """What torch.compile takes for an op, in a few words."""
    asked = COMPILE_WITH_ATEN.get(op)
    if asked is None:
        return "inlined" if settings.INLINE else "ours or ATen, by its neighbours (explain_compiled tells)"
    return f"{'ATen' if asked else 'our operator'} (compile_with_aten)"
