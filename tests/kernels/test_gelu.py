"""gelu's polynomials are what fit_gelu fits, and within the contract before anything is rounded, multiply-adds fused or not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fused_ops.kernels.linear import activations
from tests.kernels.fit_gelu import FITS, Fit, cdf, fitted, slope

EPS = 2.0**-24
FACTOR = 4.0  # of the contract: so many times sqrt(K) sum|terms| / 2^24
HERE = {
    "GELU": (activations.GELU, activations.INV_GELU_BOUND),
    "GELU_SLOPE": (activations.GELU_SLOPE, activations.INV_GELU_SLOPE_BOUND),
}
INPUTS = np.concatenate([np.linspace(-12, 12, 400_001), np.geomspace(1e-30, 3e38, 2001), -np.geomspace(1e-30, 3e38, 2001)])


def step(name: str, x: NDArray[np.float32], fused: bool) -> NDArray[np.float32]:
    """activations.odd_step in numpy."""
    coefficients, scale = (found.value for found in HERE[name])

    def multiply_add(a: NDArray[np.float32], b: NDArray[np.float32], c: float) -> NDArray[np.float32]:
        if fused:
            return (a.astype(np.float64) * b.astype(np.float64) + float(np.float32(c))).astype(np.float32)
        return a * b + np.float32(c)

    with np.errstate(over="ignore"):
        c = np.clip(x * np.float32(scale), np.float32(-1), np.float32(1))
    t = multiply_add(c, c, -0.5)
    p = np.full_like(x, np.float32(coefficients[0]))
    for coefficient in coefficients[1:]:
        p = multiply_add(p, t, coefficient)
    return multiply_add(c, p, 0.5)


@pytest.mark.parametrize("name", FITS)
def test_the_coefficients_are_those_that_are_fitted(name: str) -> None:
    found, scale = HERE[name]
    fit: Fit = FITS[name]
    assert scale.value == 1 / fit.bound
    powers = 2.0 ** np.arange(fit.degree, -1, -1)  # both in powers of a number up to 1
    np.testing.assert_allclose(np.array(found.value) / powers, fitted(fit) / powers, rtol=0, atol=1e-7)
    assert all(float(np.float32(value)) == value for value in found.value)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FITS)
def test_a_step_is_exact_at_its_ends(name: str, fused: bool) -> None:
    bound = FITS[name].bound
    x = np.array([-np.inf, -3e38, -100.0, -bound, bound, 100.0, 3e38, np.inf], np.float32)
    assert step(name, x, fused).tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("fused", [True, False])
def test_both_are_within_the_contract(fused: bool) -> None:
    """The least that the contract allows: of fwd_bound and bwd_bound of a linear what the activation alone is given."""
    x = INPUTS.astype(np.float32)
    wide = x.astype(np.float64)
    y = x * step("GELU", x, fused)
    ratio = np.abs(y - wide * cdf(wide)) / (FACTOR * EPS * np.maximum(2.2 * np.abs(wide), 2.0**-126))
    assert ratio.max() <= 0.45
    exact = np.where(np.abs(wide) > 40, wide > 0, slope(np.clip(wide, -40, 40)))
    ratio = np.abs(step("GELU_SLOPE", x, fused) - exact) / (FACTOR * EPS * (np.abs(exact) + 4 * (1 + np.abs(wide))))
    assert ratio.max() <= 0.55
