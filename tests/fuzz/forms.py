"""Tensors that a few words describe: a dtype, a layout and a kind of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES_AND_FLOAT = FLOATS[:3]
OTHER_REAL = (torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
LAYOUTS = (
    "contiguous", "transposed", "swapped", "sliced", "padded", "offset1", "offset3", "expanded", "last_expanded", "negative",
    "overlapping", "channels_last",
)  # fmt: skip
VALUES = ("normal", "offset", "constant", "zero", "subnormal", "special", "infinite", "large")
MODERATE = frozenset(("normal", "constant", "zero", "special", "infinite"))
"""Kinds of values whose finite part is neither huge nor badly conditioned."""


@dataclass(frozen=True)
class Form:
    """A tensor but for its shape. scale: of normal values; of large ones, the largest magnitude."""

    dtype: torch.dtype
    layout: str = "contiguous"
    values: str = "normal"
    scale: float = 1.0
    seed: int = 0

    def build(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this form and shape, the same for the same seed. dtype: what its numbers are converted to."""
        return place(self._numbers(shape).to(dtype or self.dtype), self.layout)

    def _numbers(self, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.dtype.is_floating_point:
            return _rounded(self._floats(normal, generator), self.dtype)
        if self.dtype is torch.bool:
            return normal > 0
        if self.dtype.is_complex:
            return torch.complex(normal, -normal).to(self.dtype)
        small = (normal * 10).round()
        return (small if self.dtype.is_signed else small.abs()).to(self.dtype)

    def _floats(self, normal: Tensor, generator: torch.Generator) -> Tensor:
        match self.values:
            case "offset":
                return normal * self.scale + 300.0
            case "constant":
                return torch.full_like(normal, 3.0 * self.scale)
            case "zero":
                return torch.zeros_like(normal).copysign(normal)
            case "subnormal":
                return normal * torch.finfo(self.dtype).smallest_normal / 2
            case "large":
                return (torch.rand(normal.shape, generator=generator, dtype=torch.float64) * 2 - 1) * self.scale
            case "special" | "infinite" if normal.numel():
                pool = torch.tensor([float("inf"), -float("inf"), float("nan")][: 3 if self.values == "special" else 2])
                count = 1 + normal.numel() // 40
                where = torch.randint(normal.numel(), (count,), generator=generator)
                what = pool[torch.randint(len(pool), (count,), generator=generator)].double()
                return (normal * self.scale).flatten().index_put((where,), what).view(normal.shape)
        return normal * self.scale


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize == 1:  # beyond the largest number these give NaN
        top = torch.finfo(dtype).max
        return values.float().clamp(-top, top).to(dtype)
    return values.to(dtype)


def _storage(shape: list[int] | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory in which whatever is no element of the tensor shows: NaN, or a large integer."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan")).to(dtype)
    return torch.full(shape, 100).to(dtype)


def place(x: Tensor, layout: str) -> Tensor:
    """x in a layout. Expanded and overlapping ones repeat some of x's elements in place of the others."""
    shape, rank = tuple(x.shape), x.dim()
    if layout == "negative" and x.dtype in FLOATS:
        return torch._neg_view(-x)
    if layout.startswith("offset"):
        start = int(layout[-1])
        view = _storage([x.numel() + start], x.dtype)[start:].view(shape)
    elif layout == "overlapping" and x.numel():
        return x.flatten()[: sum(shape) - rank + 1].clone().as_strided(shape, (1,) * rank)
    elif layout in ("expanded", "last_expanded") and any(size > 1 for size in shape):
        dims = [d for d, size in enumerate(shape) if size > 1]
        return x.narrow(dims[0] if layout == "expanded" else dims[-1], 0, 1).clone().expand(shape)
    elif layout == "sliced":
        view = _storage([2 * size + 1 for size in shape], x.dtype)[tuple(slice(1, 1 + 2 * size, 2) for size in shape)]
    elif layout == "padded" and rank:
        view = _storage([*shape[:-1], shape[-1] + 3], x.dtype)[..., : shape[-1]]
    elif rank and (layout == "transposed" or (layout == "channels_last" and rank != 4)):
        view = _storage(shape[::-1], x.dtype).permute(*range(rank)[::-1])
    elif layout == "swapped" and rank > 1:
        view = _storage([*shape[:-2], shape[-1], shape[-2]], x.dtype).transpose(-1, -2)
    elif layout == "channels_last" and rank == 4:
        return x.contiguous(memory_format=torch.channels_last)
    else:
        return x.contiguous()
    return view.copy_(x)
