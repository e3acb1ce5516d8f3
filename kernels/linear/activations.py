"""Activation functions and their derivatives on fp32 tiles, chosen at compile time by name.

ACT is one of ACTIVATIONS, or "none". NaN goes through every one of them, as in ATen. A gradient above a closed relu is
dropped by a select: infinity times 0 would be NaN. Elsewhere it is multiplied by the derivative, which is 1 or 0 at large
finite x, and for gelu, quick_gelu and silu NaN at infinities, as ATen's.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2")

TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)  # tanh(u) = 2 sigmoid(2u) - 1 takes the 2 in
GELU_CUBIC = tl.constexpr(0.044715)  # Hendrycks and Gimpel 2016
QUICK_GELU_SLOPE = tl.constexpr(1.702)  # Hendrycks and Gimpel 2016
LARGEST_SQUARE = tl.constexpr(1e4)  # of gelu_tanh's derivative, which is 1 or 0 long before
LOST = tl.constexpr(1.5 * 2.0**-22)  # by so much the reciprocal root and its square may make a sigmoid of 1 less than 1
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e)

# Polynomials of gelu(x) / x and of gelu'(x), as `odd_step` takes them; tests/kernels/fit_gelu.py fits them. Before rounding they
# err by at most 0.4 and 0.5 of what the contract allows, with multiply-adds fused or not.
INV_GELU_BOUND = tl.constexpr(1 / 5.25)
GELU = tl.constexpr((
    -23.038043975830078, 31.34696388244629, -15.084741592407227, 10.03185749053955, -13.524100303649902, 12.195728302001953,
    -8.73819351196289, 6.156878471374512, -4.196970462799072, 2.6934351921081543, -1.6703437566757202, 1.0425211191177368,
    -0.7048293352127075, 0.7069616317749023,
))  # fmt: skip
INV_GELU_SLOPE_BOUND = tl.constexpr(1 / 5.5)
GELU_SLOPE = tl.constexpr((
    -1395.4615478515625, 1257.5648193359375, 143.00466918945312, -40.18960952758789, -458.48809814453125, 320.58184814453125,
    -124.99829864501953, 79.04486083984375, -53.517765045166016, 27.01365089416504, -12.020800590515137, 5.278324127197266,
    -2.365835428237915, 1.1810044050216675, -0.7231311798095703, 0.7081748843193054,
))  # fmt: skip


@triton.jit
def odd_step(c, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """0.5 + c P(c^2 - 0.5), c held to [-1, 1]: a step from 0 to 1, exactly so at the ends, for P(0.5) is 0.5.

    COEFFICIENTS: of P, of this degree, the highest power first. NaN gives 0 or 1 or NaN: what multiplies the step must keep it.
    """
    c = tl.clamp(c, -1.0, 1.0)
    t = c * c - 0.5
    p = t * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, DEGREE + 1):
        p = p * t + COEFFICIENTS[i]
    return c * p + 0.5


@triton.jit
def _sigmoid(x, SCALE: tl.constexpr):
    """1 / (1 + exp(-SCALE x)). The square of a reciprocal root is one instruction where a division is six, and errs as much."""
    root = tl.rsqrt(1.0 + tl.exp2(x * (-SCALE * LOG2_E)))
    return root * root


@triton.jit
def _sigmoid_and_slope(x, SCALE: tl.constexpr, PRECISE: tl.constexpr):
    """(s, s (1 - s)) for s = sigmoid(SCALE x), SCALE > 0, of which the second is to be multiplied by powers of x.

    1 - s cancels where s is near 1: an error of exp2 or of the root is all that is left of it, and a large x makes it count.
    PRECISE: with e = exp(-SCALE |x|) and r = 1 / (1 + e), s is r or e r by x's sign, and s (1 - s) is e r^2. That takes registers;
    16-bit results need no more than that 1 - s be 0 where it is lost, so a little is taken from it everywhere.
    """
    if PRECISE:
        e = tl.exp2(tl.abs(x) * (-SCALE * LOG2_E))
        r = 1.0 / (1.0 + e)
        s = tl.where(x >= 0.0, r, e * r)
        slope = e * r * r
    else:
        s = _sigmoid(x, SCALE)
        slope = s * tl.maximum(1.0 - s - LOST, 0.0)
    return s, slope


@triton.jit
def _tanh(x):
    """tanh with a small relative error everywhere: Lambert's continued fraction below 1, the exponential form above."""
    x2 = x * x
    numerator = x * (135135.0 + x2 * (17325.0 + x2 * (378.0 + x2)))
    denominator = 135135.0 + x2 * (62370.0 + x2 * (3150.0 + x2 * 28.0))
    large = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
    return tl.where(tl.abs(x) < 1.0, numerator / denominator, large)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x), fp32 in and out."""
    if ACT == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif ACT == "gelu":
        return x * odd_step(x * INV_GELU_BOUND, GELU, 13)
    elif ACT == "gelu_tanh":
        return x * _sigmoid(x + x * x * x * GELU_CUBIC, TWO_SQRT_2_OVER_PI)
    elif ACT == "quick_gelu":
        return x * _sigmoid(x, QUICK_GELU_SLOPE)
    elif ACT == "silu":
        return x * _sigmoid(x, 1.0)
    elif ACT == "sigmoid":
        return _sigmoid(x, 1.0)
    elif ACT == "tanh":
        return _tanh(x)
    elif ACT == "relu2":
        r = tl.where(x <= 0.0, 0.0, x)
        return r * r
    else:
        tl.static_assert(ACT == "none", "unknown activation")
        return x


@triton.jit
def activation_grad(x, dy, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """dy * act'(x), fp32 in and out; x is the pre-activation (for relu the output serves as well)."""
    if ACT == "relu":
        return tl.where(x <= 0.0, 0.0, dy)
    elif ACT == "gelu":
        return dy * (x * 0.0 + odd_step(x * INV_GELU_SLOPE_BOUND, GELU_SLOPE, 15))  # NaN at infinities
    elif ACT == "gelu_tanh":
        x2 = tl.minimum(x * x, LARGEST_SQUARE)  # or slope, 0, would be multiplied by infinity where x is large
        s, slope = _sigmoid_and_slope(x + x * x2 * GELU_CUBIC, TWO_SQRT_2_OVER_PI, PRECISE)
        inner = (1.0 + x2 * (3.0 * GELU_CUBIC)) * TWO_SQRT_2_OVER_PI
        return dy * (s + x * slope * inner)
    elif ACT == "quick_gelu":
        s, slope = _sigmoid_and_slope(x, QUICK_GELU_SLOPE, PRECISE)
        return dy * (s + x * (QUICK_GELU_SLOPE * slope))  # x * QUICK_GELU_SLOPE may overflow
    elif ACT == "silu":
        s, slope = _sigmoid_and_slope(x, 1.0, PRECISE)
        return dy * (s + x * slope)
    elif ACT == "sigmoid":
        if PRECISE:
            _, slope = _sigmoid_and_slope(x, 1.0, PRECISE)
        else:
            s = _sigmoid(x, 1.0)
            slope = s * (1.0 - s)
        return dy * slope
    elif ACT == "tanh":
        t = _tanh(x)
        return dy * (1.0 - t * t)
    elif ACT == "relu2":
        return tl.where(x <= 0.0, 0.0, 2.0 * (dy * x))
    else:
        tl.static_assert(ACT == "none", "unknown activation")
        return dy
