"""Launches kept by what determines them: sizes, strides, dtypes and the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_plans: list[Any] = []


def plan(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: keep what function returned, a Planned, for each set of arguments.

    Choosing a configuration takes longer than launching it. function's arguments (sizes, strides, dtypes, device) must
    determine everything of the launch but the tensors' addresses. Symbolic sizes cannot be kept and are planned at each
    call. A cluster that the GPU refuses is planned again, without clusters.
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
    """Drop every plan, so that all are made again: call it after a change of configurations."""
    for kept in _plans:
        kept.cache_clear()
