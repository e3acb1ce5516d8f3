"""Launches kept by what chose them: sizes, strides, dtypes and the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_plans: list[Any] = []


def plan(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, of sizes, strides, dtypes and the device, with what it answered kept: choosing a launch takes longer than
    launching. It answers a Planned, whose arguments but for addresses they settle, every tensor's dtype too.

    Symbolic sizes cannot be kept and are worked out each time. A cluster that is refused is planned again, without.
    """

    def make(*args: Any) -> Any:
        planned = function(*args)
        if planned.options.get("num_ctas", 1) > 1:
            planned.runs_directly, planned.instead = False, functools.partial(call, *args)
        return planned

    kept = functools.lru_cache(4096)(make)
    _plans.append(kept)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return kept(*args)
        except TypeError:
            return make(*args)

    return call


def forget_plans() -> None:
    """Let every plan be made again: after a change of configurations."""
    for kept in _plans:
        kept.cache_clear()
