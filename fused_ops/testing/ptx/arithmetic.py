"""What the arithmetic instructions compute: functions of numpy arrays, one lane an element, of the instruction's types.

INSTRUCTIONS, COMPARISONS and CONVERSIONS hold each by its full mnemonic. What they lack the machine refuses: no modifier is ignored.
A result of fp32, fp16 or bf16 is rounded once, to nearest even. Which NaN comes out PTX leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from .approximate import BOUNDS, approximate

TYPES: dict[str, type] = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
WIDER: dict[str, type] = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
BITS = ("b16", "b32", "b64")
SMALLEST = np.float32(2.0**-126)
Function = Callable[..., np.ndarray]
Known = tuple[Function, str, str]  # (function, type of the operands, type of the result)


def flushed(x: np.ndarray) -> np.ndarray:
    """x with subnormals as zeros of their sign: what .ftz does."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x).astype(np.float32)


def _flushing(function: Function) -> Function:
    """function of fp32 whose operands and result are flushed."""
    return lambda *x: flushed(function(*map(flushed, x)))


def _unary(function: Function) -> Function:
    """function of one array alone: numpy's would take a second, to write into."""
    return lambda a: function(a)


def _binary(function: Function) -> Function:
    """function of two arrays alone."""
    return lambda a, b: function(a, b)


def _integer_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Truncated towards zero, as PTX; numpy's // rounds down. By zero PTX leaves the result open: here all bits are set."""
    quotient = a // b
    remainder = a - quotient * b
    truncated = np.where((remainder != 0) & ((remainder < 0) != (a < 0)), quotient + quotient.dtype.type(1), quotient)
    return np.where(b == 0, ~np.zeros_like(truncated), truncated)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, ~np.zeros_like(a), a - _integer_divide(a, b) * b)


def _shift(function: Function) -> Function:
    def shift(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        bits = a.dtype.itemsize * 8
        near = function(a, np.minimum(by, bits - 1).astype(a.dtype))
        beyond = np.where(a < 0, a.dtype.type(-1), a.dtype.type(0)) if a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(by >= bits, beyond, near).astype(a.dtype)

    return shift


def _bit_field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """length bits of a 32-bit a from bit start on, sign-extended where a's type is signed. Of start and length 8 bits count."""
    start, length = (start & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
    moved = a.astype(np.int64) >> np.minimum(start, 63)  # beyond a's last bit come copies of its sign, or zeros
    field = moved & ((np.int64(1) << np.minimum(length, 32)) - 1)
    if a.dtype.kind == "i":
        sign = (np.int64(1) << np.minimum(length, 32)) >> 1
        field = (field ^ sign) - sign
    return field.astype(a.dtype)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each byte of the result is a byte of (b, a), chosen by a nibble, or eight copies of that byte's sign."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (source >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once.

    fp64 holds the product exactly. Of the sum it rounds, and rounding that again is wrong where it falls halfway between two
    float32, or below the normal ones. There the sum is first rounded to odd: to the neighbour whose last bit is set, which no
    halfway point has (Boldo and Melquiond, 2008).
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = np.asarray(product + addend)
    size = np.abs(total)
    bits = total.view(np.int64)
    twice = ((bits & 0x1FFFFFFF) == 0x10000000) | ((size < 2.0**-126) & (size > 0))
    if not twice.any():
        return total.astype(np.float32)
    back = total - product  # the sum's own error, exact (Knuth)
    error = (product - (total - back)) + (addend - back)
    odd = bits + np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    inexact = twice & (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    return np.where(inexact, odd, bits).view(np.float64).astype(np.float32)


def _wide(kind: str) -> Function:
    wider = WIDER[kind]
    return lambda a, b, c=None: a.astype(wider) * b.astype(wider) + (wider(0) if c is None else c.view(wider))


def _high(kind: str) -> Function:
    number, wider, bits = TYPES[kind], WIDER[kind], TYPES[kind](0).itemsize * 8
    return lambda a, b: (a.astype(wider) * b.astype(wider) >> wider(bits)).astype(number)


def _extremum(kind: str, function: Function) -> Function:
    """min or max of floats by numpy's, but of zeros of unlike signs -0 is the smaller."""
    bits = np.dtype(f"u{TYPES[kind](0).itemsize}")
    both = np.bitwise_or if function in (np.fmin, np.minimum) else np.bitwise_and

    def extremum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        chosen = function(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)
        return np.where(a == b, both(a.view(bits), b.view(bits)), chosen.view(bits)).view(a.dtype)

    return extremum


def _least_magnitude(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min.xorsign.abs: the smaller magnitude, a NaN passed over, with the product's sign."""
    sign = (a.view(np.uint32) ^ b.view(np.uint32)) & np.uint32(1 << 31)
    return (np.fmin(np.abs(a), np.abs(b)).view(np.uint32) & np.uint32((1 << 31) - 1) | sign).view(np.float32)


def _instructions() -> Iterator[tuple[str, Known]]:
    """(mnemonic, (function, type of the operands, type of the result)) of every instruction but setp and cvt."""
    binary: dict[str, Function] = {
        "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum, "div": _integer_divide,
        "rem": _remainder,
    }  # fmt: skip
    logic: dict[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    for kind in INTEGERS:
        for name, function in binary.items():
            yield f"{name}.{kind}", (_binary(function), kind, kind)
        yield f"mad.lo.{kind}", (lambda a, b, c: a * b + c, kind, kind)
        if kind in WIDER:
            wider = f"b{WIDER[kind](0).itemsize * 8}"
            yield f"mul.wide.{kind}", (_wide(kind), kind, wider)
            yield f"mad.wide.{kind}", (_wide(kind), kind, wider)
            yield f"mul.hi.{kind}", (_high(kind), kind, kind)
        if kind[0] == "s":
            yield f"neg.{kind}", (_unary(np.negative), kind, kind)
            yield f"abs.{kind}", (_unary(np.abs), kind, kind)
        yield f"shr.{kind}", (_shift(np.right_shift), kind, kind)
    for kind in BITS:
        yield f"shl.{kind}", (_shift(np.left_shift), kind, kind)
        yield f"shr.{kind}", (_shift(np.right_shift), kind, kind)
    for kind in (*BITS, "pred"):
        for name, function in logic.items():
            yield f"{name}.{kind}", (_binary(function), kind, kind)
        yield f"not.{kind}", (_unary(np.invert), kind, kind)
    for kind in ("b32", "b64"):
        yield f"popc.{kind}", (lambda a: np.bitwise_count(a).astype(np.uint32), kind, "b32")
    for kind in ("u32", "s32"):
        yield f"bfe.{kind}", (_bit_field, kind, kind)
    yield "prmt.b32", (_permute, "b32", "b32")
    for name, rounding, function in _floats():
        for flush, run in (("", function), (".ftz", _flushing(function))):
            yield name.replace("?", flush) + ".f32", (run, "f32", "f32")
            if rounding:
                yield name.replace("?", ".rn" + flush) + ".f32", (run, "f32", "f32")
    for kind in ("f16", "bf16"):
        for name, ignoring, keeping in (("min", np.fmin, np.minimum), ("max", np.fmax, np.maximum)):
            yield f"{name}.{kind}", (_extremum(kind, ignoring), kind, kind)
            yield f"{name}.NaN.{kind}", (_extremum(kind, keeping), kind, kind)
            yield f"{name}.{kind}x2", (_of_pairs(kind, _extremum(kind, ignoring)), "b32", "b32")


def _of_pairs(kind: str, function: Function) -> Function:
    """function of two 16-bit floats, of each half of two registers; a NaN is PTX's canonical one."""

    def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for shift in (np.uint32(0), np.uint32(16)):
            halves: list[np.ndarray] = [(v >> shift).astype(np.uint16).view(TYPES[kind]) for v in (a, b)]
            half = function(*halves)
            nan = np.isnan(half.astype(np.float32))
            result |= np.where(nan, np.uint16(0x7FFF), half.view(np.uint16)).astype(np.uint32) << shift
        return result

    return both


def _floats() -> Iterator[tuple[str, bool, Function]]:
    """(name with ? where .ftz goes, whether .rn may stand before it, function) of the instructions on fp32."""
    yield "add?", True, _binary(np.add)
    yield "sub?", True, _binary(np.subtract)
    yield "mul?", True, _binary(np.multiply)
    yield "fma.rn?", False, fma
    yield "div.rn?", False, _binary(np.divide)
    yield "rcp.rn?", False, lambda a: np.float32(1) / a
    yield "sqrt.rn?", False, _unary(np.sqrt)
    yield "neg?", False, _unary(np.negative)
    yield "abs?", False, _unary(np.abs)
    for name, ignoring, keeping in (("min", np.fmin, np.minimum), ("max", np.fmax, np.maximum)):
        yield f"{name}?", False, _extremum("f32", ignoring)
        yield f"{name}?.NaN", False, _extremum("f32", keeping)
    yield "min?.xorsign.abs", False, _least_magnitude
    for name in BOUNDS:
        yield f"{name}?", False, approximate(name)


INSTRUCTIONS: dict[str, Known] = dict(_instructions())
"""Every arithmetic instruction but setp and cvt, by its mnemonic."""
del INSTRUCTIONS["tanh.approx.ftz.f32"]  # which PTX does not have


def arithmetic(op: tuple[str, ...]) -> Known | None:
    """(function, type of the operands, type of the result) of an arithmetic instruction; None for any other."""
    return INSTRUCTIONS.get(".".join(op))


def _unordered(function: Function) -> Function:
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


def _comparisons() -> Iterator[tuple[str, tuple[Function, str]]]:
    ordered: dict[str, Function] = {
        "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal,
    }  # fmt: skip
    above_zero = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    for kind in (*BITS, *INTEGERS):
        yield f"setp.eq.{kind}", (np.equal, kind)
        yield f"setp.ne.{kind}", (np.not_equal, kind)
        for name in ("lt", "le", "gt", "ge") if kind[0] != "b" else ():
            yield f"setp.{name}.{kind}", (ordered[name], kind)
        for name, same in above_zero.items() if kind[0] == "u" else ():
            yield f"setp.{name}.{kind}", (ordered[same], kind)
    for kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
        both = {
            **ordered,
            **{f"{name}u": _unordered(np.not_equal if name == "ne" else function) for name, function in ordered.items()},
            "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
            "nan": lambda a, b: np.isnan(a) | np.isnan(b),
        }
        for name, function in both.items():
            yield f"setp.{name}.{kind}", (function, kind)
            if kind == "f32":
                yield f"setp.{name}.ftz.{kind}", (lambda a, b, f=function: f(flushed(a), flushed(b)), kind)


COMPARISONS: dict[str, tuple[Function, str]] = dict(_comparisons())
"""Every comparison, by its mnemonic: (function, type of the operands)."""


def comparison(op: tuple[str, ...]) -> tuple[Function, str]:
    """(function, type of the operands) of setp.<comparison>[.ftz].<type>; raises NotImplementedError for one that is unknown."""
    name = ".".join(op)
    if name not in COMPARISONS:
        raise NotImplementedError(name)
    return COMPARISONS[name]


def _halves(x: np.ndarray, number: type) -> np.ndarray:
    """The bits of float32 rounded to nearest even in a 16-bit or 8-bit type, any NaN as the one that PTX gives."""
    bits = np.dtype(f"u{number(0).itemsize}")
    rounded = x.astype(np.float32).astype(number).view(bits)
    return np.where(np.isnan(x), bits.type(0x7FFF if bits.itemsize == 2 else 0x7F), rounded).astype(bits)


def _to_integer(rounding: Function, kind: str) -> Function:
    """float32 to an integer: clamped to the type's range; NaN is 0, or in 64 bits the top bit alone."""
    number = TYPES[kind]
    least, most = np.iinfo(number).min, np.iinfo(number).max
    nan = np.array(1 << 63, np.uint64).view(number) if number(0).itemsize == 8 else number(0)

    def convert(x: np.ndarray) -> np.ndarray:
        value = rounding(x.astype(np.float64))
        below, above = value < float(least), value >= float(most + 1)
        inside: np.ndarray = np.where(below | above | np.isnan(value), 0.0, value).astype(number)
        return np.select([np.isnan(value), below, above], [nan, number(least), number(most)], inside)

    return convert


def _conversions() -> Iterator[tuple[str, Known]]:
    """Conversions of one number."""
    integers = ("s8", "u8", *INTEGERS)
    for target in integers:
        for source in integers:
            yield f"cvt.{target}.{source}", (lambda x, t=TYPES[target]: x.astype(t), source, target)
    roundings: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for flush in ("", ".ftz"):
        for name, rounding in roundings.items():
            for target in integers:
                to = _to_integer(rounding, target)
                yield f"cvt.{name}{flush}.{target}.f32", (_before(to) if flush else to, "f32", target)
            yield f"cvt.{name}{flush}.f32.f32", (_flushing(rounding) if flush else _unary(rounding), "f32", "f32")
    for source in integers:
        yield f"cvt.rn.f32.{source}", (lambda x: x.astype(np.float32), source, "f32")
    for kind in ("f16", "bf16"):
        yield f"cvt.f32.{kind}", (lambda x: x.astype(np.float32), kind, "f32")
        yield f"cvt.rn.{kind}.f32", (lambda x, t=TYPES[kind]: _halves(x, t), "f32", "b16")
    yield "cvt.f64.f32", (lambda x: x.astype(np.float64), "f32", "f64")
    yield "cvt.rn.f32.f64", (lambda x: x.astype(np.float32), "f64", "f32")


def _before(function: Function) -> Function:
    return lambda x: function(flushed(x))


def _pairs() -> Iterator[tuple[str, Known]]:
    """Conversions to and from two numbers in one register; the first operand is the upper."""
    for kind in ("f16", "bf16"):
        yield (
            f"cvt.rn.{kind}x2.f32",
            (
                lambda high, low, t=TYPES[kind]: _halves(high, t).astype(np.uint32) << np.uint32(16) | _halves(low, t),
                "f32",
                "b32",
            ),
        )
    e4m3 = TYPES["e4m3"]
    top = np.float32(448)

    def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        halves = [_halves(np.clip(x, -top, top), e4m3).astype(np.uint16) for x in (high, low)]
        return halves[0] << np.uint16(8) | halves[1]

    def unpack(pair: np.ndarray) -> np.ndarray:
        halves = [(pair >> np.uint16(s)).astype(np.uint8).view(e4m3).astype(np.float16).view(np.uint16) for s in (8, 0)]
        return halves[0].astype(np.uint32) << np.uint32(16) | halves[1]

    yield "cvt.rn.satfinite.e4m3x2.f32", (pack, "f32", "b16")
    yield "cvt.rn.f16x2.e4m3x2", (unpack, "b16", "b32")


CONVERSIONS: dict[str, Known] = dict(_conversions())
PAIRS: dict[str, Known] = dict(_pairs())


def convert(op: tuple[str, ...]) -> Known | None:
    """(function, type of the operand, type of the result) of cvt to and from one number; None for any other."""
    return CONVERSIONS.get(".".join(op))


def convert_pair(op: tuple[str, ...]) -> Known | None:
    """(function, type of the operands, type of the result) of cvt to or from two numbers in one register; None for any other."""
    return PAIRS.get(".".join(op))
