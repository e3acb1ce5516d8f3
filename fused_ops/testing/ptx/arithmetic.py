"""What the arithmetic instructions compute: functions of numpy arrays, one lane an element, of the instruction's types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np

TYPES: dict[str, type] = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
SMALLEST = np.float32(2.0**-126)
MODIFIERS = {"lo", "hi", "wide", "rn", "ftz", "approx", "full", "NaN"}
Function = Callable[..., np.ndarray]


def flushed(x: np.ndarray) -> np.ndarray:
    """x with subnormals as zeros of their sign: what .ftz does."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x).astype(np.float32)


_error: tuple[int, int] = (0, 0)  # (ulps, sign) of approximate instructions


@contextmanager
def errors(ulps: int, sign: int) -> Iterator[None]:
    """While active, approximate fp32 instructions (ex2, lg2, rcp, rsqrt, sqrt, tanh, div) miss the exact result by ulps.

    sign: 1 upwards in magnitude, -1 downwards, 0 either way by a hash of the result. PTX documents 2 ulp for ex2 and div.
    Results that are zero, infinite, NaN or nearly so (beyond 2^-120 and 2^120) stay exact.
    """
    global _error
    before, _error = _error, (ulps, sign)
    try:
        yield
    finally:
        _error = before


def _approximate(function: Function) -> Function:
    """function of float32 with the errors that are active when it runs."""

    def erring(*operands: np.ndarray) -> np.ndarray:
        exact = np.asarray(function(*operands), np.float32)
        ulps, sign = _error
        if not ulps:
            return exact
        bits = exact.view(np.int32)
        up = (bits.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31) if sign == 0 else np.uint32(sign > 0)
        moved = (bits + np.where(up, np.int32(ulps), np.int32(-ulps))).view(np.float32)
        size = np.abs(exact)
        return np.where((size > 2.0**-120) & (size < 2.0**120), moved, exact)

    return erring


def _float_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(a / b, np.float32)


def _integer_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Truncated towards zero, as PTX; numpy's // rounds down."""
    quotient = a // b
    remainder = a - quotient * b
    return np.where((remainder != 0) & ((remainder < 0) != (a < 0)), quotient + quotient.dtype.type(1), quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _integer_divide(a, b) * b


def _shift(function: Function) -> Function:
    def shift(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        bits = a.dtype.itemsize * 8
        near = function(a, np.minimum(by, bits - 1).astype(a.dtype))
        beyond = np.where(a < 0, a.dtype.type(-1), a.dtype.type(0)) if a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(by >= bits, beyond, near).astype(a.dtype)

    return shift


def _bit_field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """length bits of a from bit start on, sign-extended where a's type is signed."""
    wide = a.astype(np.int64) if a.dtype.kind == "i" else a.astype(np.uint64).astype(np.int64)
    start, length = start.astype(np.int64), length.astype(np.int64)
    field = (wide >> start) & ((np.int64(1) << length) - 1)
    if a.dtype.kind == "i":
        sign = np.int64(1) << (length - 1)
        field = (field ^ sign) - sign
    return field.astype(a.dtype)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each byte of the result is a byte of (b, a), chosen by a nibble."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (source >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once (float64 holds the product exactly)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _wide(type_name: str) -> Function:
    wider = WIDER[type_name]
    return lambda a, b, c=None: a.astype(wider) * b.astype(wider) + (wider(0) if c is None else c.view(wider))


BINARY: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": _shift(np.left_shift), "shr": _shift(np.right_shift), "rem": _remainder,
}  # fmt: skip
UNARY: dict[str, Function] = {
    "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "tanh": np.tanh,
    "rcp": lambda x: np.asarray(np.float32(1) / x, np.float32), "rsqrt": lambda x: np.asarray(1 / np.sqrt(x), np.float32),
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
}  # fmt: skip
ORDERED: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def arithmetic(op: tuple[str, ...]) -> tuple[Function, str, str] | None:
    """(function, type of the operands, type of the result) of an arithmetic instruction; None for any other."""
    name, modifiers, kind = op[0], op[1:-1], op[-1]
    number = TYPES.get(kind)
    if number is None or not set(modifiers) <= MODIFIERS:
        return None
    function: Function | None = None
    result = kind
    if name == "not":
        function = np.logical_not if kind == "pred" else np.invert
    elif name in BINARY:
        function = BINARY[name]
    elif name in UNARY:
        function = UNARY[name]
    elif name in ("max", "min"):
        pairs = {"max": (np.maximum, np.fmax), "min": (np.minimum, np.fmin)}[name]
        function = pairs[0] if "NaN" in modifiers or kind[0] in "us" else pairs[1]
    elif name == "mul":
        function, result = (
            (_wide(kind), {"2": "b32", "4": "b64"}[str(number(0).itemsize)]) if "wide" in modifiers else (np.multiply, kind)
        )
        if "hi" in modifiers:
            bits = number(0).itemsize * 8
            function = lambda a, b: (a.astype(WIDER[kind]) * b.astype(WIDER[kind]) >> WIDER[kind](bits)).astype(number)  # noqa: E731
    elif name == "mad":
        function, result = (_wide(kind), "b64") if "wide" in modifiers else ((lambda a, b, c: a * b + c), kind)
    elif name == "fma":
        function = fma if kind == "f32" else None
    elif name == "div":
        function = _float_divide if kind == "f32" else _integer_divide
    elif name == "bfe":
        function = _bit_field
    elif name == "prmt":
        function = _permute
    if function is None:
        return None
    if kind == "f32" and {"approx", "full"} & set(modifiers):
        function = _approximate(function)
    if "ftz" in modifiers:
        inner = function
        return (lambda *x: flushed(inner(*map(flushed, x)))), kind, result
    return function, kind, result


def comparison(op: tuple[str, ...]) -> tuple[Function, str]:
    """(function, type of the operands) of setp.<comparison>[.ftz].<type>."""
    name, kind = op[1], op[-1]
    if name in ("num", "nan"):
        return (lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")), kind
    if not kind.startswith(("f", "bf")):
        return (np.not_equal if name == "ne" else ORDERED[name]), kind
    if name in ("neu", "equ", "ltu", "leu", "gtu", "geu"):
        ordered = ORDERED[name[:-1]]
        return (lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)), kind
    return ORDERED[name], kind


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 rounded to nearest even bfloat16."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def convert(op: tuple[str, ...]) -> tuple[Function, str, str] | None:
    """(function, type of the operand, type of the result) of cvt to and from one number; None for cvt of pairs."""
    target, source = op[-2], op[-1]
    modifiers = op[1:-2]
    if "x2" in target or "x2" in source:
        return None
    known = {"rn", "rni", "rz", "rzi", "ftz", "sat", "satfinite", "rna"}
    if not set(modifiers) <= known or target not in TYPES or source not in TYPES:
        return None
    if target == "tf32" or "sat" in modifiers or "rna" in modifiers:
        return None
    number = TYPES[target]
    if source[0] in "fb" and source != "b16" and target[0] in "us":
        rounding = np.trunc if "rzi" in modifiers else np.rint
        return (lambda x: rounding(x.astype(np.float64)).astype(number)), source, target
    between = np.float32 if source in ("f16", "bf16", "e4m3") else TYPES[source]
    return (lambda x: x.astype(between).astype(number)), source, target


def convert_pair(op: tuple[str, ...]) -> tuple[Function, str, str] | None:
    """(function, type of the operands, type of the result) of cvt to or from two numbers in one register."""
    target, source = op[-2], op[-1]
    if target.endswith("x2") and source == "f32":
        number = TYPES[target[:-2]]
        size = number(0).itemsize * 8
        wide = np.uint32 if size == 16 else np.uint16
        bits = np.uint16 if size == 16 else np.uint8
        limit = np.float32(448.0) if "satfinite" in op else np.float32(np.inf)

        def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            halves = [np.clip(x, -limit, limit).astype(number).view(bits).astype(wide) for x in (high, low)]
            return halves[0] << wide(size) | halves[1]

        return pack, "f32", "b32" if size == 16 else "b16"
    if target == "f16x2" and source == "e4m3x2":

        def unpack(pair: np.ndarray) -> np.ndarray:
            halves = [
                (pair >> np.uint16(s)).astype(np.uint8).view(TYPES["e4m3"]).astype(np.float16).view(np.uint16) for s in (8, 0)
            ]
            return halves[0].astype(np.uint32) << np.uint32(16) | halves[1]

        return unpack, "b16", "b32"
    return None
