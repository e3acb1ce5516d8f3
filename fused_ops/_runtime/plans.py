"""Launches kept by what chooses their configuration: sizes but for the number of rows, strides, dtypes and the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .compiled import Planned

PLANS = 4096  # that one launcher keeps
MANY_ROWS = 1 << 40  # more than any launch has: what the largest grid of a persistent kernel is computed for
_Answer = TypeVar("_Answer")
_plans: list[Any] = []


def plan(function: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Decorator: keep what function returned, a Planned or something that holds some, for each set of arguments.

    Choosing a configuration takes longer than launching it. function's arguments (sizes, strides, dtypes, device) must
    determine everything of the launch but the number of rows M and the tensors' addresses. Where a configuration depends on
    M, the argument is a rounding of M by which few plans serve all numbers: for rows, (M - 1).bit_length(), the power of two
    that M is at most.
    """
    kept = functools.lru_cache(PLANS)(function)
    _plans.append(kept)
    return kept


def may_be_refused(planned: Planned, instead: Callable[[Exception], Planned]) -> Planned:
    """planned, which the GPU or the compiler may refuse; then instead(error) plans another one."""
    planned.runs_directly, planned.instead = False, instead
    return planned


def forget_plans() -> None:
    """Drop every plan, so that all are made again: call it after a change of configurations."""
    for kept in _plans:
        kept.cache_clear()
