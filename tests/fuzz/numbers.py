"""Comparisons of numbers: with the contract where it applies, loosely with the fp64 formula everywhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_ops.testing import ContractMode, Expected, Raw, assert_within_contract

from .calls import Call, parameters
from .forms import MODERATE, Form

LOOSE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 0.12, torch.float8_e4m3fn: 0.2}
"""Relative errors, of the largest number of a result, that no right implementation reaches: several roundings and sums."""


class Watch(ContractMode):
    """ContractMode that keeps what each forward operator was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[tuple[Raw, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raw = self._operators.get(func)
        if raw is not None and raw.forward:
            self.forwards.append((raw, args))
        return super().__torch_dispatch__(func, types, args, kwargs)


def within_contract(results: list[Any], raw: Raw, args: tuple[Any, ...]) -> None:
    """Hold what a public function answered to the bound of its raw operator. AssertionError where it is beyond."""
    for i, (out, expected) in enumerate(zip(results, raw.bound(*args))):
        if expected is not None:
            same_shape = Expected(expected.value.reshape(out.shape), expected.scale.reshape(out.shape))
            assert_within_contract(out, same_shape, f"output {i}")


def tolerance(call: Call, results: list[Any]) -> float:
    """LOOSE of the least precise float that takes part."""
    dtypes = {form.dtype for form in call.tensors.values() if form is not None} | {r.dtype for r in results if r is not None}
    dtypes |= {value for value in call.options.values() if isinstance(value, torch.dtype)}
    if "autocast" in call.way and torch.float64 not in dtypes:
        dtypes.add(getattr(torch, call.way.removeprefix("autocast_")))
    return max((LOOSE[dtype] for dtype in dtypes if dtype in LOOSE), default=LOOSE[torch.float32])


def is_moderate(call: Call) -> bool:
    """Whether no finite number of the call is huge or tiny, or makes a difference of large numbers."""
    forms = [form for form in (*call.tensors.values(), call.dy if call.needs else None) if form is not None]
    return all(form.values in MODERATE and 1e-2 <= form.scale <= 10 for form in forms)


def is_ordinary(call: Call) -> bool:
    """Whether all numbers are finite, too, and no row that is normalised has a variance of next to nothing."""
    forms = [form for form in (*call.tensors.values(), call.dy if call.needs else None) if form is not None]
    if any(form.values in ("special", "infinite") for form in forms):
        return False
    norm = any(p.role == "v" for p in parameters(call.op))
    flat = math.prod(call.inner) < 3 or any(form.values != "normal" or form.layout == "last_expanded" for form in forms)
    small = any(p.kind == "eps" and (call.options[p.name] or 1.0) < 1e-5 for p in parameters(call.op))
    return is_moderate(call) and not (norm and (flat or small or (call.way == "penalty" and not _is_wide(forms))))


def _is_wide(forms: list[Form]) -> bool:
    return all(form.dtype in (torch.float32, torch.float64) for form in forms)


def misplaced(out: Tensor, exact: Tensor, by_order: bool = False) -> str | None:
    """What is wrong with the places of out's NaN and infinities, or None. None, too, where a number overflowed on its way.

    by_order: whether sums of infinities give NaN or infinity by the order in which they are taken.
    """
    got, want = out.detach().double(), exact.detach().double()
    finite = want[want.isfinite()].abs()
    if finite.numel() and finite.max() > torch.finfo(out.dtype).max / 64:
        return None
    differs = (got.isnan() != want.isnan()) | ((got.isinf() | want.isinf()) & (got != want) & ~want.isnan())
    if by_order:
        differs &= got.isfinite() | want.isfinite()
    if not differs.any():
        return None
    index = tuple(int(i) for i in differs.nonzero()[0])
    return f"{int(differs.sum())} of {got.numel()} differ, the first at {index}: got {got[index].item()}, exact {want[index].item()}"


def far(out: Tensor, exact: Tensor, relative: float) -> str | None:
    """How far out is from exact, where both are finite and it is more than relative allows; or None."""
    got, want = out.detach().double(), exact.detach().double()
    both = got.isfinite() & want.isfinite()
    if not both.any():
        return None
    error, size = (got - want).abs()[both], want[both].abs()
    allowed = relative * (size + size.max() + 1e-3)
    if bool((error <= allowed).all()):
        return None
    worst = int((error / allowed).argmax())
    return f"got {got[both][worst].item():.6g}, exact {want[both][worst].item():.6g}, {(error / allowed)[worst].item():.3g} times what is allowed"


def storages(values: dict[str, Any]) -> dict[str, Tensor]:
    """The whole memory behind each tensor, as bytes."""
    return {
        name: torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]
        for name, t in values.items()
        if isinstance(t, Tensor)
    }


def same_bits(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    return torch.equal(*(t.detach().resolve_neg().contiguous().flatten().view(torch.uint8) for t in (a, b)))
