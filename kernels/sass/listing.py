"""What a compiled kernel's machine code (SASS) holds: instructions by kind and by loop, and bytes on the way.

Pure Python over the text that `cuobjdump -sass` prints; trace.py says how often each instruction is executed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

KINDS = (
    "MUFU", "LDS", "STS", "BAR", "SHFL", "LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG", "HGMMA", "HMMA", "FADD",
)  # fmt: skip
"""Kinds of instruction that are counted by name; LDS and STS count their matrix forms LDSM and STSM too."""
_SAME = {"LDSM": "LDS", "STSM": "STS", "QGMMA": "HGMMA", "IGMMA": "HGMMA", "QMMA": "HMMA"}
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_WITHOUT_RESULT = {"STG", "ST", "STS", "STSM", "LDGSTS", "BRA", "EXIT", "BAR", "RED", "UTMASTG", "SYNCS"}


class Instruction(NamedTuple):
    """One instruction: where it is, its guard ("P0", "!P0" or ""), its opcode with suffixes, and its operands.

    kind: the opcode without suffixes; of matrix forms, that of the plain one.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    kind: str

    @property
    def width(self) -> int:
        """Bytes that a thread's memory access moves."""
        return next((_WIDTHS[part] for part in self.opcode.split(".")[1:] if part in _WIDTHS), 4)

    @property
    def target(self) -> int | None:
        """Where a branch goes; None where it is none, or a register says."""
        found = re.fullmatch(r"0x([0-9a-f]+)", self.operands[-1]) if self.operands else None
        return int(found[1], 16) if found and self.kind in ("BRA", "CALL") else None


@dataclass(frozen=True)
class Loop:
    """A backward branch: its first and last instruction's address, how deep it is nested (1 outermost), and what it holds."""

    start: int
    end: int
    depth: int
    counts: Counter[str]


def parse(listing: str) -> list[Instruction]:
    """The instructions of a kernel, without the padding behind its end."""
    found = []
    for address, guard, opcode, rest in _LINE.findall(listing):
        name = opcode.partition(".")[0]
        found.append(Instruction(int(address, 16), guard, opcode, _operands(rest), _SAME.get(name, name)))
    while found and found[-1].kind == "NOP":
        found.pop()
    if found and found[-1].kind == "BRA" and found[-1].target == found[-1].address:
        found.pop()
    return found


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas outside brackets; marks that change no value are dropped."""
    parts = re.split(r",\s*(?![^\[]*\]|[^{]*\})", text.replace(".reuse", ""))
    return tuple(part.strip() for part in parts if part.strip())


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many there are in all ("instructions") and of each of KINDS."""
    found: Counter[str] = Counter()
    for one in instructions:
        found["instructions"] += 1
        if one.kind in KINDS:
            found[one.kind] += 1
    return found


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops in order of their starts; backward branches to one place are one loop. An endless wait is none."""
    ends: dict[int, int] = {}
    for one in instructions:
        if one.kind == "BRA" and one.target is not None and one.target < one.address:
            ends[one.target] = max(ends.get(one.target, 0), one.address)
    waits = {s for s, e in ends.items() if _is_wait([i for i in instructions if s <= i.address <= e])}
    spans = sorted((s, e) for s, e in ends.items() if s not in waits)
    return [
        Loop(s, e, sum(a <= s and e <= b for a, b in spans), count(i for i in instructions if s <= i.address <= e))
        for s, e in spans
    ]


def _is_wait(body: Sequence[Instruction]) -> bool:
    """Whether a loop only asks again for a barrier in shared memory."""
    return len(body) <= 4 and any("TRYWAIT" in one.opcode for one in body)


def read(one: Instruction) -> set[int]:
    """The registers that an instruction reads, as far as operands name them."""
    sources = one.operands if one.kind in _WITHOUT_RESULT else one.operands[1:]
    return {int(n) for text in sources for n in _REGISTER.findall(text)}


def written(one: Instruction) -> tuple[int, ...]:
    """The registers that a load writes."""
    found = _REGISTER.match(one.operands[0])
    return tuple(int(found[1]) + k for k in range(max(1, one.width // 4))) if found else ()


def bytes_in_flight(instructions: Sequence[Instruction]) -> int:
    """The most bytes that a thread has asked global memory for and not yet waited for.

    A load is on the way until an instruction reads a register that it, or a later load, writes: loads return in order. Copies
    into shared memory are on the way until a DEPBAR leaves no more than so many groups. Loops are walked through twice, so
    that what an iteration asks for on behalf of the next one counts. Loads a quarter as wide as the widest, or less, are edges
    or a row's statistics, and do not count.
    """
    least = max((one.width for one in instructions if one.kind == "LDG"), default=0) // 4
    flying: dict[int, tuple[int, int]] = {}  # register -> (number of its load, bytes)
    groups: list[int] = [0]  # bytes of each group of copies, the last one open
    most = loads = 0
    for one in _twice(instructions):
        kind = one.kind
        if used := read(one) & flying.keys():
            newest = max(flying[n][0] for n in used)
            flying = {n: entry for n, entry in flying.items() if entry[0] > newest}
        if kind == "LDG" and one.width > least:
            loads += 1
            flying |= dict.fromkeys(written(one), (loads, one.width))
        elif kind == "LDGSTS":
            groups[-1] += one.width
        elif kind == "LDGDEPBAR":
            groups.append(0)
        elif kind == "DEPBAR" and one.operands[0] == "SB0" and len(groups) > 1:
            closed = groups[:-1]
            left = int(one.operands[1], 16)
            groups = [*closed[max(0, len(closed) - left) :], groups[-1]]
        most = max(most, sum(dict(flying.values()).values()) + sum(groups))
    return most


def stages_ahead(instructions: Sequence[Instruction]) -> int:
    """Groups of copies into shared memory that a wait leaves on the way, at the most; 0 where there are none."""
    waits = [int(i.operands[1], 16) for i in instructions if i.kind == "DEPBAR" and i.operands[0] == "SB0"]
    return max(waits, default=0) if any(i.kind == "LDGDEPBAR" for i in instructions) else 0


def _twice(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The instructions in order, each innermost loop's a second time after its end."""
    spans = [(loop.start, loop.end) for loop in loops(instructions)]
    inner = {e: s for s, e in spans if not any(s <= a and b <= e and (a, b) != (s, e) for a, b in spans)}
    walked: list[Instruction] = []
    for one in instructions:
        walked.append(one)
        if one.address in inner:
            walked += [i for i in instructions if inner[one.address] <= i.address <= one.address]
    return walked
