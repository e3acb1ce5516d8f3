"""What was asked for of each op under torch.compile, and the key that says so to Inductor's caches."""

from __future__ import annotations

from .._runtime import settings

COMPILE_WITH_ATEN: dict[str, bool | None] = {}
"""By the op's name: True for ATen's formula, False for our operator, None for what `compile_choice` decides."""

VERSION = 1  # of what is decided and of the formulas: one more when an older compiled graph must not be taken for a new one


def add_op(name: str) -> None:
    """Enter an op in COMPILE_WITH_ATEN: None, unless FUSED_OPS_COMPILE_WITH_ATEN names it or is "all"."""
    COMPILE_WITH_ATEN[name] = True if settings.COMPILE_WITH_ATEN & {name, "all"} else None


def cache_key() -> str:
    """What a compiled graph depends on beside the graph that Dynamo gives, as text."""
    asked = ",".join(f"{name}={value}" for name, value in sorted(COMPILE_WITH_ATEN.items()) if value is not None)
    return f"{VERSION};{settings.BACKEND};{settings.INLINE};{asked}"
