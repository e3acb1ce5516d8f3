"""What each integer instruction of SASS computes, as a Python expression of its operands."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

Step = Any  # of integers, which imports this module

M = 0xFFFFFFFF
NAME = re.compile(r"^([-~!|]*)(UR|UP|R|P)(\d+|Z|T)\|?(?:\.\w+)*$")
SPECIAL = {"SR_TID.X": 0, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_LANEID": 0, "SR_CgaCtaId": 0, "SR_CgaCtaRank": 0, "SRZ": 0}  # fmt: skip


def is_predicate(text: str) -> bool:
    found = NAME.match(text)
    return found is not None and found[2] in ("P", "UP")


def signed(x: int) -> int:
    """A 32-bit pattern as a signed number."""
    return x - (1 << 32) if x & 0x80000000 else x


def _signed64(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _lut(a: int | None, b: int | None, c: int | None, table: int) -> int:
    """A function of three bits, bit by bit. What is unknown may not matter: x & 0 is 0."""
    choices = [(x,) if x is not None else (0, M) for x in (a, b, c)]
    results = {_looked_up(x, y, z, table) for x in choices[0] for y in choices[1] for z in choices[2]}
    if len(results) > 1:
        raise TypeError
    return results.pop()


def _looked_up(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & M


def _prmt(a: int, selector: int, b: int) -> int:
    data = (b << 32) | a
    out = 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = data >> 8 * (choice & 7) & 255
        out |= ((0xFF if byte & 0x80 else 0) if choice & 8 else byte) << 8 * i
    return out


def _bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def _number(x: int | None) -> float:
    if x is None:
        raise TypeError
    return float(struct.unpack("<f", struct.pack("<I", x))[0])


def _reciprocal(x: int) -> int:
    value = _number(x)
    return _bits(1.0 / value) if value else 0x7F800000


def _truncated(x: int) -> int:
    value = _number(x)
    return max(0, min(M, math.trunc(value))) if math.isfinite(value) else 0


def _at(x: Sequence[Any], i: int) -> int:
    value = x[i + 1] << 32 | x[i]
    return int(value)


def _extended(high: int, other: int, low: bool, name: str) -> bool:
    """A comparison of the high words, decided by that of the low ones where they are equal."""
    if name in ("EQ", "NE"):
        return (high == other and low) if name == "EQ" else (high != other or low)
    return low if high == other else (high < other if name in ("LT", "LE") else high > other)


HELPERS: dict[str, Any] = {
    "signed": signed, "s64": _signed64, "lut": _lut, "prmt": _prmt, "rcp": _reciprocal, "trunc": _truncated, "at": _at,
    "bits": _bits, "extended": _extended,
}  # fmt: skip
_COMPARE = {"GE": ">=", "GT": ">", "LE": "<=", "LT": "<", "EQ": "==", "NE": "!="}


def _split(operands: list[str]) -> tuple[str, list[str], list[str], list[str]]:
    """(destination, predicates that are written, sources, predicates that are read) of dst, P.., sources.., P.."""
    rest = operands[1:]
    out: list[str] = []
    while rest and is_predicate(rest[0]):
        out.append(rest.pop(0))
    ins: list[str] = []
    while rest and is_predicate(rest[-1]):
        ins.insert(0, rest.pop())
    return operands[0], out, rest, ins


Rule = Callable[["Step", list[str]], None]


def _move(step: Step, ops: list[str]) -> None:
    if "64" in step.flags or (step.name == "CS2R" and "32" not in step.flags):
        step._set_pair(ops[0], step._pair(ops[1]) if step.name != "CS2R" else str(SPECIAL.get(ops[1], "None")))
    elif "128" in step.flags:
        raise ValueError
    else:
        sources = [op for op in ops[1:] if not is_predicate(op)]
        step._set(ops[0], step._value(sources[0]))


def _add(step: Step, ops: list[str]) -> None:
    dst, out, sources, ins = _split(ops)
    if "64" in step.flags:
        step._set_pair(dst, " + ".join(step._pair(op) for op in sources))
        return
    total = " + ".join([step._value(op) for op in sources] + [step._predicate(op) for op in ins])
    step._set(dst, f"({total}) & {M}")
    for n, text in enumerate(out):
        step._set(text, f"({total}) >> 32 > {n}")


def _multiply(step: Step, ops: list[str]) -> None:
    dst, out, sources, ins = _split(ops)
    a, b = (step._value(op) for op in sources[:2])
    if "WIDE" in step.flags or "HI" in step.flags:
        if "U32" not in step.flags:
            a, b = f"H['signed'](({a}) & {M})", f"H['signed'](({b}) & {M})"
        total = f"({a}) * ({b}) + {step._pair(sources[2])}"
        if "HI" in step.flags:
            step._set(dst, f"(({total}) >> 32) & {M}")
        else:
            step._set_pair(dst, f"({total}) & {(1 << 64) - 1}")
            for text in out:
                step._set(text, f"({total}) >> 64 > 0")
        return
    total = " + ".join([f"({a}) * ({b})", step._value(sources[2]), *(step._predicate(op) for op in ins)])
    step._set(dst, f"({total}) & {M}")
    for text in out:
        step._set(text, f"({total}) >> 32 > 0")


def _logic(step: Step, ops: list[str]) -> None:
    out = ops.pop(0) if is_predicate(ops[0]) else ""
    a, b, c = (step._value(op) for op in ops[1:4])
    value = f"H['lut']({a}, {b}, {c}, {int(ops[4], 16)})"
    step._set(ops[0], value)
    if out:
        step._set(out, f"{value} != 0")


def _shift(step: Step, ops: list[str]) -> None:
    a, b, c = (step._value(op) for op in ops[1:4])
    whole = f"(({c}) << 32 | ({a}))"
    by = f"min({b}, 63)"
    if "L" in step.flags:
        value = f"({whole} << {by}) >> 32" if "HI" in step.flags else f"({a}) << {by}"
    elif "HI" in step.flags:
        value = f"H['signed'](({c}) & {M}) >> {by}" if {"S32", "S64"} & set(step.flags) else f"({c}) >> {by}"
    else:
        value = f"H['s64']({whole}) >> {by}" if "S64" in step.flags else f"{whole} >> {by}"
    step._set(ops[0], f"({value}) & {M}")


def _lea(step: Step, ops: list[str]) -> None:
    dst, out, sources, ins = _split(ops)
    a, b = (step._value(op) for op in sources[:2])
    by = int(sources[-1], 16)
    if "HI" in step.flags:
        whole = f"H['signed'](({a}) & {M})" if "SX32" in step.flags else f"(({step._value(sources[2])}) << 32 | ({a}))"
        total = " + ".join([f"((({whole} << {by}) >> 32) & {M})", b, *(step._predicate(op) for op in ins)])
    else:
        total = f"((({a}) << {by}) & {M}) + {b}"
    step._set(dst, f"({total}) & {M}")
    for text in out:
        step._set(text, f"({total}) >> 32 > 0")


def _compare(step: Step, ops: list[str]) -> None:
    name = step.flags[0]
    a, b = step._value(ops[2]), step._value(ops[3])
    if "U32" not in step.flags:
        a, b = f"H['signed'](({a}) & {M})", f"H['signed'](({b}) & {M})"
    else:
        a, b = f"(({a}) & {M})", f"(({b}) & {M})"
    if "EX" in step.flags:
        result = f"H['extended']({a}, {b}, {step._predicate(ops[5])}, '{name}')"
    else:
        result = f"{a} {_COMPARE[name]} {b}"
    joined = step._predicate(ops[4]) if len(ops) > 4 else "True"
    sign = {"AND": "&", "OR": "|", "XOR": "^"}[next(f for f in step.flags if f in ("AND", "OR", "XOR"))]
    step._set(ops[0], f"({result}) {sign} ({joined})")
    if ops[1] not in ("PT", "UPT"):
        step._set(ops[1], f"(not ({result})) {sign} ({joined})")


def _choose(step: Step, ops: list[str]) -> None:
    test = step._predicate(ops[3])
    step._set(ops[0], f"(({step._value(ops[1])}) if H['bool']({test}) else ({step._value(ops[2])})) & {M}")


def _least(step: Step, ops: list[str]) -> None:
    a, b = (step._value(op) for op in ops[1:3])
    if "U32" not in step.flags:
        a, b = f"H['signed'](({a}) & {M})", f"H['signed'](({b}) & {M})"
    step._set(ops[0], f"(min if H['bool']({step._predicate(ops[3])}) else max)({a}, {b}) & {M}")


def _predicates(step: Step, ops: list[str]) -> None:
    a, b, c = (step._predicate(op) for op in ops[2:5])
    for target, text in zip(ops[:2], ops[5:7]):
        if target not in ("PT", "UPT"):
            step._set(target, f"bool({int(text, 16)} >> (H['bool']({a}) * 4 + H['bool']({b}) * 2 + H['bool']({c})) & 1)")


def _pack(step: Step, ops: list[str]) -> None:
    letter, mask = ("q" if ops[1] == "UPR" else "p"), int(ops[-1], 16)
    bits = [n for n in range(7) if mask >> n & 1]
    step.reads |= {f"{letter}{n}" for n in bits}
    step._set(ops[0], " | ".join(f"H['bool']({letter}[{n}]) << {n}" for n in bits) or "0")


def _unpack(step: Step, ops: list[str]) -> None:
    letter, mask = ("q" if ops[0] == "UPR" else "p"), int(ops[-1], 16)
    value = step._value(ops[1])
    for n in range(7):
        if mask >> n & 1:
            step._set(f"{'UP' if letter == 'q' else 'P'}{n}", f"bool({value} >> {n} & 1)")


def _known(value: bool | None) -> bool:
    """A predicate that must be known: unknown makes the result unknown, as arithmetic on None does."""
    if value is None:
        raise TypeError
    return value


HELPERS["bool"] = _known


def _vote(step: Step, ops: list[str]) -> None:
    targets = [op for op in ops[:-1] if is_predicate(op)]
    for target in targets:
        step._set(target, step._predicate(ops[-1]))
    if not is_predicate(ops[0]):
        step._set(ops[0], "None")


def _elect(step: Step, ops: list[str]) -> None:
    step._set(ops[0], "True")


def _halves(step: Step, ops: list[str]) -> None:
    """HFMA2 with zero factors: a way to load two half-precision constants."""
    if ops[1].lstrip("-") != "RZ" and ops[2].lstrip("-") != "RZ":
        raise ValueError
    high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in ops[3:5])
    step._set(ops[0], str(high << 16 | low))


def _to_float(step: Step, ops: list[str]) -> None:
    value = step._value(ops[-1])
    number = value if "U32" in step.flags[-2:] else f"H['signed'](({value}) & {M})"
    step._set(ops[0], f"H['bits'](float({number}))")


def _rcp(step: Step, ops: list[str]) -> None:
    if "RCP" not in step.flags:
        raise ValueError
    step._set(ops[0], f"H['rcp']({step._value(ops[1])})")


RULES: dict[str, Rule] = {
    "MOV": _move, "LDC": _move, "LDCU": _move, "S2R": _move, "S2UR": _move, "R2UR": _move, "CS2R": _move, "IADD3": _add,
    "VIADD": _add, "IADD": _add, "IMAD": _multiply, "LOP3": _logic, "SHF": _shift, "LEA": _lea, "ISETP": _compare,
    "SEL": _choose, "VIMNMX": _least, "IMNMX": _least, "PLOP3": _predicates, "P2R": _pack, "R2P": _unpack, "UP2UR": _pack,
    "P2UR": _pack, "UR2UP": _unpack, "R2UP": _unpack, "VOTE": _vote, "VOTEU": _vote, "ELECT": _elect, "HFMA2": _halves,
    "I2F": _to_float, "I2FP": _to_float, "MUFU": _rcp,
    "IABS": lambda step, ops: step._set(ops[0], f"abs(H['signed']({step._value(ops[1])}))"),
    "F2I": lambda step, ops: step._set(ops[0], f"H['trunc']({step._value(ops[1])})"),
    "PRMT": lambda step, ops: step._set(ops[0], f"H['prmt']({', '.join(step._value(op) for op in ops[1:4])})"),
    "SGXT": lambda step, ops: step._set(ops[0], f"{step._value(ops[1])} & {(1 << int(ops[2], 16)) - 1}"),
}  # fmt: skip
