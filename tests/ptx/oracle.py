"""What PTX says each arithmetic instruction computes, in Python's integers, fractions and decimals: one lane, bits in and bits out.

It shares nothing with the machine that it is compared with. A NaN of any payload is NAN.
"""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

NAN = "NaN"
FORMATS = {
    "f16": (5, 10),
    "bf16": (8, 7),
    "f32": (8, 23),
    "f64": (11, 52),
    "e4m3": (4, 3),
}  # bits of the exponent, the fraction
decimal.getcontext().prec = 60
decimal.getcontext().Emax, decimal.getcontext().Emin = 10**9, -(10**9)
DECIMAL_LN2 = decimal.Decimal(2).ln()


def width(kind: str) -> int:
    """The bits of a type."""
    return sum(FORMATS[kind]) + 1 if kind in FORMATS else 1 if kind == "pred" else int(kind[1:])


def number(bits: int, kind: str) -> float | int:
    """The value of bits: of a float as fp64, which holds every type's, of an integer by its sign."""
    if kind not in FORMATS:
        return bits - (1 << width(kind)) if kind[0] == "s" and bits >> width(kind) - 1 else bits
    exponent_bits, fraction_bits = FORMATS[kind]
    exponent, fraction = bits >> fraction_bits & (1 << exponent_bits) - 1, bits & (1 << fraction_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    if kind == "e4m3":
        size = math.nan if bits & 127 == 127 else None
    else:
        size = (math.nan if fraction else math.inf) if exponent == (1 << exponent_bits) - 1 else None
    if size is None:
        size = math.ldexp(fraction + ((exponent > 0) << fraction_bits), max(exponent, 1) - bias - fraction_bits)
    return math.copysign(size, -1.0 if bits >> width(kind) - 1 else 1.0)


def rounded(value: Fraction, kind: str, negative: bool = False) -> int:
    """The bits of an exact value to nearest even. negative: the sign of a zero."""
    exponent_bits, fraction_bits = FORMATS[kind]
    sign, size, bias = (value < 0 or (value == 0 and negative)) << width(kind) - 1, abs(value), (1 << exponent_bits - 1) - 1
    if size == 0:
        return sign
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    exponent = max(exponent, 1 - bias)
    bits = round(size / Fraction(2) ** (exponent - fraction_bits)) + (exponent + bias - 1 << fraction_bits)
    return sign | min(bits, 0x7E if kind == "e4m3" else (1 << exponent_bits) - 1 << fraction_bits)


def of(value: float | Fraction, kind: str) -> int | str:
    """The bits of a value, rounded."""
    if isinstance(value, Fraction):
        return rounded(value, kind)
    if math.isnan(value):
        return NAN
    if math.isinf(value):
        exponent_bits, fraction_bits = FORMATS[kind]
        return (value < 0) << width(kind) - 1 | (1 << exponent_bits) - 1 << fraction_bits
    return rounded(Fraction(value), kind, math.copysign(1.0, value) < 0)


def flushed(bits: int | str, kind: str = "f32") -> int | str:
    """A subnormal as a zero of its sign."""
    if isinstance(bits, str) or bits >> FORMATS[kind][1] & (1 << FORMATS[kind][0]) - 1:
        return bits
    return bits & 1 << width(kind) - 1


def fma(a: float, b: float, c: float, kind: str = "f32") -> int | str:
    """a * b + c, rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        return of(a * b + c if math.isinf(a) or math.isinf(b) or a != a or b != b else c, kind)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    signs = math.copysign(1, a) * math.copysign(1, b) < 0, math.copysign(1, c) < 0
    return rounded(exact, kind, all(signs))


def quotient(a: float, b: float, kind: str = "f32") -> int | str:
    """a / b, rounded."""
    negative = math.copysign(1, a) * math.copysign(1, b) < 0
    if a != a or b != b or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return NAN
    if b == 0 or math.isinf(a):
        return of(-math.inf if negative else math.inf, kind)
    return rounded(Fraction(0) if math.isinf(b) else Fraction(a) / Fraction(b), kind, negative)


def exact_function(name: str, x: float) -> float | Fraction:
    """A function of one number, to 60 digits; a float where that is exact."""
    if x != x or (x < 0 and name in ("sqrt", "rsqrt", "lg2")):
        return math.nan
    if name == "rcp":
        return math.copysign(math.inf, x) if x == 0 else math.copysign(0.0, x) if math.isinf(x) else 1 / Fraction(x)
    if name == "ex2":
        return (math.inf if x > 0 else 0.0) if abs(x) > 1e6 else Fraction((decimal.Decimal(x) * DECIMAL_LN2).exp())
    if name == "tanh":
        if x == 0 or math.isinf(x):
            return x if x == 0 else math.copysign(1.0, x)
        if abs(x) < 1e-12:  # the next term is beyond what any rounding here sees
            return Fraction(x) - Fraction(x) ** 3 / 3
        e = (2 * decimal.Decimal(max(-1e3, min(x, 1e3)))).exp()
        return Fraction((e - 1) / (e + 1))
    if x == 0 or math.isinf(x):
        return {"sqrt": x, "rsqrt": 0.0 if x else math.copysign(math.inf, x), "lg2": x if x else -math.inf}[name]
    if name == "lg2":
        return Fraction(decimal.Decimal(x).ln() / DECIMAL_LN2)
    root = decimal.Decimal(x).sqrt()
    return Fraction(root) if name == "sqrt" else Fraction(1 / root)


def least(a: float, b: float, keeps_nan: bool) -> float:
    """min: -0 is below +0, and a NaN is what is missing unless it is to be kept."""
    if a != a or b != b:
        return math.nan if keeps_nan or (a != a and b != b) else b if a != a else a
    if a == b == 0:
        return a if math.copysign(1, a) < 0 else b
    return a if a < b else b


def floating(parts: list[str], kind: str, operands: list[float]) -> int | str:
    """An instruction on floats: its name, modifiers but ftz, type and operands."""
    name, a, b = parts[0], operands[0], operands[1] if len(operands) > 1 else 0.0
    if name in ("add", "sub"):
        b = b if name == "add" else -b
        return fma(a, 1.0, b, kind)
    if name == "mul":
        if not (math.isfinite(a) and math.isfinite(b)):
            return of(a * b, kind)
        return rounded(Fraction(a) * Fraction(b), kind, math.copysign(1, a) * math.copysign(1, b) < 0)
    if name == "fma":
        return fma(*operands, kind)
    if name == "div":
        if parts[1] == "approx" and 2.0**126 < abs(b) < math.inf:
            negative = math.copysign(1, a) * math.copysign(1, b) < 0
            return NAN if math.isinf(a) or a != a else negative << 31
        if parts[1] == "approx" and 0 < abs(b) < 2.0**-126:
            reciprocal = number(int(quotient(1.0, b)), "f32")
            return floating(["mul"], kind, [a, reciprocal])
        return quotient(a, b, kind)
    if "xorsign" in parts:
        return of(math.copysign(least(abs(a), abs(b), False), math.copysign(1, a) * math.copysign(1, b)), kind)
    if name in ("min", "max"):
        keeps = "NaN" in parts
        return of(least(a, b, keeps) if name == "min" else -least(-a, -b, keeps), kind)
    if name in ("neg", "abs"):
        return of(-a if name == "neg" else abs(a), kind)
    return of(exact_function(name, a), kind)


def integer(parts: list[str], kind: str, operands: list[int], bits: list[int]) -> int:
    """An instruction on integers and bits: bits are the operands' own."""
    name, size, a = parts[0], width(kind), operands[0]
    b = operands[1] if len(operands) > 1 else 0
    mask = (1 << size) - 1
    if name in ("mul", "mad") and "wide" in parts:
        c = bits[2] if name == "mad" else 0
        return a * b + c & (1 << 2 * size) - 1
    if name == "mul" and "hi" in parts:
        return a * b >> size & mask
    if name in ("div", "rem"):
        if b == 0:
            return mask  # open in PTX
        q = abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)
        return (q if name == "div" else a - q * b) & mask
    if name == "bfe":
        start, length = bits[1] & 255, bits[2] & 255
        sign = 0 if kind[0] == "u" or not length else bits[0] >> min(start + length - 1, size - 1) & 1
        out = [bits[0] >> start + i & 1 if i < length and start + i < size else sign for i in range(size)]
        return sum(bit << i for i, bit in enumerate(out))
    if name == "prmt":
        source = (bits[0] | bits[1] << 32).to_bytes(8, "little")
        chosen = [(source[n & 7], n & 8) for n in (bits[2] >> 4 * i & 15 for i in range(4))]
        return int.from_bytes([(255 if byte & 128 else 0) if sign else byte for byte, sign in chosen], "little")
    shifts = {"shl": lambda: a << min(bits[1], size), "shr": lambda: a >> min(bits[1], size)}
    if name in shifts:
        return shifts[name]() & mask
    return {
        "add": a + b, "sub": a - b, "mul": a * b, "mad": a * b + operands[-1], "min": min(a, b), "max": max(a, b), "neg": -a,
        "abs": abs(a), "and": a & b, "or": a | b, "xor": a ^ b, "not": ~a, "popc": bits[0].bit_count(),
    }[name] & mask  # fmt: skip


def computed(mnemonic: str, bits: list[int], kinds: list[str]) -> int | str:
    """The bits of an arithmetic instruction's result."""
    *parts, kind = mnemonic.split(".")
    if kind.endswith("x2"):
        single = kind.removesuffix("x2")
        halves = [computed(".".join([*parts, single]), [b >> shift & 0xFFFF for b in bits], [single] * 2) for shift in (0, 16)]
        low, high = (0x7FFF if half == NAN else int(half) for half in halves)
        return low | high << 16
    if kind not in FORMATS:
        return integer(parts, kind, [int(number(b, k)) for b, k in zip(bits, kinds)], bits)
    flush = "ftz" in parts
    values = [float(number(int(flushed(b)) if flush else b, kind)) for b in bits]
    result = floating([p for p in parts if p != "ftz"], kind, values)
    return flushed(result) if flush else result


def compared(mnemonic: str, bits: list[int]) -> bool:
    """What setp says of two numbers."""
    _, name, *modifiers, kind = mnemonic.split(".")
    a, b = (number(int(flushed(x)) if modifiers == ["ftz"] else x, kind) for x in bits)
    nan = a != a or b != b
    if name in ("num", "nan"):
        return nan == (name == "nan")
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    if nan:
        return len(name) == 3
    return {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name[:2]]


def converted(mnemonic: str, bits: int) -> int | str:
    """The bits of cvt of one number."""
    _, *modifiers, target, source = mnemonic.split(".")
    value = number(int(flushed(bits)) if "ftz" in modifiers else bits, source)
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}.get((*modifiers, "")[0])
    if target in FORMATS:
        if rounding and math.isfinite(value):
            return of(math.copysign(float(rounding(value)), value), target)
        return rounded(Fraction(value), target) if isinstance(value, int) else of(value, target)
    size = width(target)
    if rounding is None:
        return int(value) & (1 << size) - 1
    if value != value:
        return 1 << 63 if size == 64 else 0
    low, high = (-(1 << size - 1), (1 << size - 1) - 1) if target[0] == "s" else (0, (1 << size) - 1)
    return (rounding(max(low, min(Fraction(value), high))) if math.isfinite(value) else low if value < 0 else high) & (
        1 << size
    ) - 1


def e4m3(bits: int) -> int:
    """cvt.rn.satfinite.e4m3.f32: no infinities, NaN is 127."""
    value = float(number(bits, "f32"))
    return 127 if value != value else int(of(max(-448.0, min(value, 448.0)), "e4m3"))
