"""Small builders that the cases of all families share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch.spec import AuditCase, Sample

HALF_DTYPES = (torch.bfloat16, torch.float16)
TRITON_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}


def randn(*shape: int, device: str, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Normal numbers from a seed of their own, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + offset
    return values.to(device=device, dtype=dtype)


_Samples = Callable[[str, torch.dtype], Iterator[Sample]]
SMALL = 1000  # elements of a tensor that finite differences are taken of


def tagged(basic: str, addressing: Iterable[str], rough: Iterable[str] = ()) -> Callable[[_Samples], _Samples]:
    """Decorator of an op's samples that gives them their tags.

    basic, addressing: the samples, by name, that get the tag. rough: those that are not smooth, though small and finite.
    """
    stress, kinks = frozenset(addressing), frozenset(rough)

    def decorate(samples: _Samples) -> _Samples:
        @functools.wraps(samples)
        def with_tags(device: str, dtype: torch.dtype) -> Iterator[Sample]:
            for sample in samples(device, dtype):
                has = {
                    "basic": sample.name == basic,
                    "addressing": sample.name in stress,
                    "smooth": sample.name not in kinks and _is_smooth(sample),
                }
                yield dataclasses.replace(sample, tags=frozenset(tag for tag, holds in has.items() if holds))

        return with_tags

    return decorate


def _is_smooth(sample: Sample) -> bool:
    tensors = [a for a in sample.args if isinstance(a, Tensor)]
    ordinary = all(0 < t.numel() <= SMALL and t.is_floating_point() and t.dtype.itemsize > 1 for t in tensors)
    return ordinary and sample.kwargs.get("dtype") is None and all(bool(t.isfinite().all()) for t in tensors)


def audit_case(
    kernel: Any, config: str, dtype: torch.dtype, args: dict[str, Any], constexprs: dict[str, Any],
    num_warps: int, num_stages: int = 1, aligned: bool | None = None, num_ctas: int = 1,
) -> AuditCase:  # fmt: skip
    """One ahead-of-time compilation, specialised as a launch would be.

    args: name -> "*x" (a pointer to the case's dtype), another Triton type, or an int for an i32 size or stride. An int of
    1 becomes a constant, and a multiple of 16 is marked by ":16". aligned: whether 128-bit loads are due; by default where
    every stride is a multiple of 16.
    """
    name = TRITON_NAMES[dtype]
    signature: dict[str, str] = {}
    constants = dict(constexprs)
    for key, value in args.items():
        if isinstance(value, int) and value == 1:
            constants[key] = 1
        elif isinstance(value, int):
            signature[key] = "i32:16" if value % 16 == 0 else "i32"
        elif value == "*x":
            signature[key] = f"*{name}:16"
        else:
            signature[key] = value + ":16" if value.startswith("*") else value
    if aligned is None:
        aligned = all(v.endswith(":16") for k, v in signature.items() if k.startswith("stride"))
    if num_ctas > 1:
        config += f" clusters of {num_ctas}"
    return AuditCase(kernel, config, name, signature, constants, num_warps, num_stages, aligned, num_ctas)


def cross(first: Iterable[Any], second: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Every pair."""
    second = list(second)
    return [(a, b) for a in first for b in second]
