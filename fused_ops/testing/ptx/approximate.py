"""Approximate fp32 instructions: the correctly rounded result, or one as far from it as PTX allows a GPU to be.

PTX bounds the error of each (PTX ISA 9.7.3) and says no more, so a kernel must be right for every result within the bound. On a
machine with no GPU the results at its ends stand for all: `documented_errors` makes each instruction err by its own bound, `errors`
all by the same number of ulps. Instructions that PTX rounds (.rn) never err.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

Function = Callable[..., np.ndarray]
INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class Bound:
    """How far a result may lie from the right one.

    section: where the PTX ISA says so. ulps: from the correctly rounded result. relative, absolute: from the exact one; where both
    are given, the absolute bound holds for operands inside `interval` and the relative one outside.
    """

    section: str
    ulps: int = 0
    relative: float = 0.0
    absolute: float = 0.0
    interval: tuple[float, float] | None = None


BOUNDS = {
    "div.approx": Bound("9.7.3.8", ulps=2),  # where 2^-126 <= |b| <= 2^126
    "div.full": Bound("9.7.3.8", ulps=2),
    "rcp.approx": Bound("9.7.3.13", ulps=1),
    "sqrt.approx": Bound("9.7.3.15", relative=2.0**-23),
    "rsqrt.approx": Bound("9.7.3.16", relative=2.0**-22.9),
    "lg2.approx": Bound("9.7.3.20", relative=2.0**-22, absolute=2.0**-22, interval=(0.5, 2.0)),
    "ex2.approx": Bound("9.7.3.21", ulps=2),
    "tanh.approx": Bound("9.7.3.22", relative=2.0**-11),
}
"""The documented error of each approximate instruction on fp32, by its name and modifier."""


def _quotient_by_reciprocal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div.approx: a * (1 / b), which for the largest b is 0, or NaN where a is infinite."""
    reciprocal = (1.0 / b).astype(np.float32).astype(np.float64)
    size = np.abs(b)
    quotient = np.where(size < 2.0**-126, a * reciprocal, a / b)
    largest = np.where(np.isinf(a), np.nan, np.copysign(0.0, a) * np.copysign(1.0, b))
    return np.where((size > 2.0**126) & np.isfinite(b), largest, quotient)


EXACT: dict[str, Function] = {
    "div.approx": _quotient_by_reciprocal,
    "div.full": lambda a, b: a / b,
    "rcp.approx": lambda a: 1.0 / a,
    "sqrt.approx": lambda a: np.sqrt(a),
    "rsqrt.approx": lambda a: 1.0 / np.sqrt(a),
    "lg2.approx": lambda a: np.log2(a),
    "ex2.approx": lambda a: np.exp2(a),
    "tanh.approx": lambda a: np.tanh(a),
}
"""What each computes, in fp64, whose own error is far less than half an ulp of fp32."""

_ulps: int | None = 0  # by which all err; None: each by its own bound
_sign = 1


@contextmanager
def errors(ulps: int | None, sign: int) -> Iterator[None]:
    """While active, approximate instructions miss the correctly rounded result by ulps, or where ulps is None by their BOUNDS.

    sign: 1 away from zero, -1 towards it, 0 either way by a hash of the result. A bound's error is the greatest that it allows: the
    number of fp32 furthest from the exact result within it. Results that are exactly what any GPU gives, as 1 is of exp2(0), err
    too. NaN, infinities and the zeros that a zero or an infinity gives stay; others err down to zero or up to infinity.
    """
    global _ulps, _sign
    before = _ulps, _sign
    _ulps, _sign = ulps, sign
    try:
        yield
    finally:
        _ulps, _sign = before


def approximate(name: str) -> Function:
    """The function on fp32 of an approximate instruction, such as "ex2.approx", with the errors that are active when it runs."""
    exact, bound = EXACT[name], BOUNDS[name]

    def erring(*operands: np.ndarray) -> np.ndarray:
        value = exact(*(np.asarray(x, np.float32).astype(np.float64) for x in operands))
        rounded = value.astype(np.float32)
        if _ulps == 0:
            return rounded
        away = _hashed(rounded) if _sign == 0 else np.broadcast_to(np.bool_(_sign > 0), rounded.shape)
        ulps = bound.ulps if _ulps is None else _ulps
        moved = _by_ulps(rounded, value, ulps, away) if ulps else _by_bound(operands[0], rounded, value, bound, away)
        return np.where(np.isfinite(value) & np.isfinite(rounded) & _free(value, operands[0], bound), moved, rounded)

    return erring


def _free(value: np.ndarray, operand: np.ndarray, bound: Bound) -> np.ndarray:
    """Where a result is not a zero that is certain. The zero of lg2(1) is not: its bound is absolute."""
    return (value != 0) | (bool(bound.absolute and _ulps is None) & (operand != 0) & np.isfinite(operand))


def _hashed(x: np.ndarray) -> np.ndarray:
    """The top bit of a multiplicative hash of the bits of x."""
    return (x.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31) != 0


def _by_ulps(rounded: np.ndarray, value: np.ndarray, ulps: int, away: np.ndarray) -> np.ndarray:
    """rounded moved by so many numbers of fp32, no further than zero or infinity."""
    size = np.abs(rounded).view(np.int32) + np.where(away, np.int32(ulps), np.int32(-ulps))
    return np.copysign(np.clip(size, 0, INFINITY_BITS).astype(np.int32).view(np.float32), value.astype(np.float32))


def _by_bound(operand: np.ndarray, rounded: np.ndarray, value: np.ndarray, bound: Bound, away: np.ndarray) -> np.ndarray:
    """The number of fp32 within the bound that is furthest from the exact value, on one side of it; rounded where there is none."""
    reach = np.abs(value) * bound.relative
    if bound.interval is not None:
        low, high = bound.interval
        reach = np.where((operand > low) & (operand < high), bound.absolute, reach)
    above = away ^ np.signbit(value)
    target = value + np.where(above, reach, -reach)
    moved = target.astype(np.float32)
    beyond = np.where(above, moved > target, moved < target)
    moved = np.where(beyond, np.nextafter(moved, np.where(above, np.float32(-np.inf), np.float32(np.inf))), moved)
    nearest = np.where(above, np.maximum(moved, rounded), np.minimum(moved, rounded))
    return np.asarray(nearest, np.float32)
