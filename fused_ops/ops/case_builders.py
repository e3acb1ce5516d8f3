"""Small builders that the cases of all families share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch.spec import Sample

INFERENCE = "inference"  # the name of audited calls that need no gradient
HALF_DTYPES = (torch.bfloat16, torch.float16)


def randn(*shape: int, device: str, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Normal numbers from a seed of their own, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + offset
    return values.to(device=device, dtype=dtype)


_Samples = Callable[[str, torch.dtype], Iterator[Sample]]
SMALL = 1000  # elements of a tensor that finite differences are taken of


def tagged(
    basic: str, addressing: Iterable[str], rough: Iterable[str] = (), first: Iterable[str] = (), slow: Iterable[str] = ()
) -> Callable[[_Samples], _Samples]:
    """Decorator of an op's samples that gives them their tags.

    basic, addressing, first, slow: the samples, by name, that get the tag; the basic one is first where no other is. rough: those
    that are not smooth, though small and finite.
    """
    stress, kinks, soon, later = frozenset(addressing), frozenset(rough), frozenset(first) or {basic}, frozenset(slow)

    def decorate(samples: _Samples) -> _Samples:
        @functools.wraps(samples)
        def with_tags(device: str, dtype: torch.dtype) -> Iterator[Sample]:
            for sample in samples(device, dtype):
                has = {
                    "basic": sample.name == basic,
                    "addressing": sample.name in stress,
                    "first": sample.name in soon,
                    "slow": sample.name in later,
                    "smooth": sample.name not in kinks and _is_smooth(sample),
                }
                yield dataclasses.replace(sample, tags=frozenset(tag for tag, holds in has.items() if holds))

        return with_tags

    return decorate


def _is_smooth(sample: Sample) -> bool:
    tensors = [a for a in sample.args if isinstance(a, Tensor)]
    ordinary = all(0 < t.numel() <= SMALL and t.is_floating_point() and t.dtype.itemsize > 1 for t in tensors)
    return ordinary and sample.kwargs.get("dtype") is None and all(bool(t.isfinite().all()) for t in tensors)


def empty(*shape: int, device: str, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Uninitialised and contiguous, start elements after an aligned address."""
    if not start:
        return torch.empty(shape, device=device, dtype=dtype)
    return torch.empty(start + math.prod(shape), device=device, dtype=dtype)[start:].view(shape)


def cross(first: Iterable[Any], second: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Every pair."""
    second = list(second)
    return [(a, b) for a in first for b in second]
