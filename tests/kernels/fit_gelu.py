"""Fits the polynomials of gelu and of its derivative: `python -m tests.kernels.fit_gelu` prints what kernels/linear/activations has.

Both are h(x) = 0.5 + c P(c^2 - 0.5) with c = x / bound held to [-1, 1]: h - 0.5 is odd, and powers of t = 2 c^2 - 1, or of half
of it, stay well conditioned in fp32, as those of c^2 do not. P is 0.5 at the end, so h is exactly 0 and 1 there. Least squares on
Chebyshev's points, weighted again and again by their residuals (Lawson), come near to the polynomial of the least maximum error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

POINTS, ROUNDS = 6000, 150

Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Fit(NamedTuple):
    """What is fitted: function on [-bound, bound] by a polynomial of this degree."""

    function: Function
    bound: float
    degree: int


def cdf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """gelu(x) / x: the normal distribution's function."""
    return np.array([0.5 * math.erfc(-value * math.sqrt(0.5)) for value in x.ravel()]).reshape(x.shape)


def slope(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """gelu'(x)."""
    return cdf(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


FITS = {"GELU": Fit(cdf, 5.25, 13), "GELU_SLOPE": Fit(slope, 5.5, 15)}


def fitted(fit: Fit) -> NDArray[np.float32]:
    """The coefficients of P, the highest power first, in fp32; the last is such that Horner's rule gives 0.5 at the end."""
    t = np.cos(np.linspace(0.0, np.pi, POINTS))
    c = np.sqrt(np.maximum((t + 1.0) / 2.0, 1e-14))
    wanted = (fit.function(c * fit.bound) - 0.5) / c - 0.5
    basis = chebyshev.chebvander(t, fit.degree - 1) * (t - 1.0)[:, None]  # P = 0.5 + (t - 1) Q
    weights = np.full_like(t, 1.0 / len(t))
    for _ in range(ROUNDS):
        scale = np.sqrt(weights) * c
        q, *_ = np.linalg.lstsq(basis * scale[:, None], wanted * scale, rcond=None)
        weights = weights * np.abs((basis @ q - wanted) * c)
        weights /= weights.sum()
    powers = chebyshev.cheb2poly(q)  # of Q, the lowest first
    p = np.zeros(fit.degree + 1)
    p[:-1] -= powers
    p[1:] += powers
    p[0] += 0.5
    rounded: NDArray[np.float32] = p[::-1].astype(np.float32)
    total = rounded[0]
    for coefficient in rounded[1:-1]:
        total = np.float32(total + coefficient)
    rounded[-1] = np.float32(0.5 - float(total))
    return rounded * np.float32(2.0) ** np.arange(fit.degree, -1, -1, dtype=np.float32)  # in powers of t / 2: exactly so


if __name__ == "__main__":
    for name, fit in FITS.items():
        print(f"{name} = ({', '.join(repr(float(value)) for value in fitted(fit))})")
