"""The integer instructions of SASS as Python: what steers a thread, for trace.py.

Every register holds a 32-bit number or None, unknown. An instruction becomes one assignment in the Python of its block; those
whose result steers nothing are left out. What is not listed here makes its result unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .listing import Instruction
from .rules import HELPERS, NAME, RULES, SPECIAL, M, is_predicate

_CONSTANT = re.compile(r"^([-~|]*)c\[0x0\]\[0x([0-9a-f]+)\]\|?$")
_ADDRESS = re.compile(r"\[(UR|R)(\d+|Z)((?:\.\w+)*)(?:\+(UR\d+))?(?:\+(-?0x[0-9a-f]+))?\]$")
_ZERO, _ZERO_U = 255, 63
_NO_RESULT = {
    "STG", "ST", "STS", "STSM", "LDGSTS", "BRA", "EXIT", "BAR", "RED", "REDG", "UTMASTG", "UTMALDG", "BSSY", "BSYNC", "DEPBAR",
    "LDGDEPBAR", "WARPSYNC", "NOP", "MEMBAR", "FENCE", "WARPGROUP", "UTMACMDFLUSH", "UTMACCTL", "CCTL", "BREAK", "RET", "CALL",
    "ERRBAR", "NANOSLEEP", "ACQBULK", "PMTRIG", "YIELD", "STL", "UCGABAR_ARV", "UCGABAR_WAIT", "UBLKCP", "PREEXIT", "BRX",
}  # fmt: skip


@dataclass
class State:
    """A thread: registers r, uniform registers u, predicates p and uniform predicates q; taken: what its last branch does."""

    memory: Any
    program_id: int
    r: list[int | None] = field(default_factory=lambda: [None] * 255 + [0])
    u: list[int | None] = field(default_factory=lambda: [None] * 63 + [0])
    p: list[bool | None] = field(default_factory=lambda: [None] * 7 + [True])
    q: list[bool | None] = field(default_factory=lambda: [None] * 7 + [True])
    taken: bool | None = True


Block = Callable[[State], None]


def compiled(
    instructions: Sequence[Instruction], blocks: Iterable[tuple[int, int]], constants: Mapping[int, int]
) -> list[Block]:
    """Each block as a Python function."""
    steps = [Step(one, constants) for one in instructions]
    needed = {name for step in steps if step.steers for name in step.reads}
    while True:
        more = {name for step in steps if step.writes & needed for name in step.reads}
        if more <= needed:
            break
        needed |= more
    made = []
    for start, end in blocks:
        lines = [line for step in steps[start:end] if step.steers or step.writes & needed for line in step.lines()]
        text = "def block(s, r, u, p, q, m):\n s.taken = True\n" + "".join(f" {line}\n" for line in lines)
        space: dict[str, Any] = {"H": HELPERS}
        exec(compile(text, "<block>", "exec"), space)
        made.append(_call(space["block"]))
    return made


def _call(function: Callable[..., None]) -> Block:
    return lambda s: function(s, s.r, s.u, s.p, s.q, s.memory)


class Step:
    """One instruction as Python: lines() sets `writes` from `reads`; steers: it is a branch or an access to memory."""

    def __init__(self, one: Instruction, constants: Mapping[int, int]) -> None:
        self.one, self.constants = one, constants
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.steers = False
        parts = one.opcode.split(".")
        self.name, self.flags = (
            parts[0].removeprefix("U") if parts[0].startswith("U") and parts[0] not in _NO_RESULT else parts[0],
            parts[1:],
        )
        self.assignments: list[tuple[str, str]] = []  # (target, value)
        self.effect = ""
        self.guard = self._predicate(one.guard) if one.guard else ""
        operands = list(one.operands)
        if one.kind in ("BRA", "EXIT", "RET", "CALL", "BRX"):
            conditions = [self._predicate(text) for text in operands if is_predicate(text)]
            never = "DIV" in self.flags or one.kind == "BRX"
            conditions = ["False"] if never else [c for c in (self.guard, *conditions) if c]
            self.guard, self.steers = "", True
            self.effect = (
                f"t = ({', '.join(conditions)},); s.taken = False if False in t else None if None in t else True"
                if conditions
                else ""
            )
        elif one.kind in ("LDG", "STG", "LDGSTS"):
            self._memory(operands)
        elif one.kind == "SYNCS":
            self._barrier(operands)
        elif one.kind not in _NO_RESULT:
            self._compute(operands)

    def lines(self) -> list[str]:
        """The instruction as lines of Python."""
        made = []
        if self.effect:
            body = self.effect
            made.append(f"if {self.guard} is not False: {body}" if self.guard else body)
        if self.assignments:
            targets = ", ".join(target for target, _ in self.assignments)
            values = ", ".join(value for _, value in self.assignments)
            unknown = " = ".join([target for target, _ in self.assignments] + ["None"])
            if all(value == "None" for _, value in self.assignments):
                made.append(f"if {self.guard} is not False: {unknown}" if self.guard else unknown)
            elif self.guard:
                made += [
                    f"if {self.guard}:",
                    f" try: {targets} = {values}",
                    f" except TypeError: {unknown}",
                    f"elif {self.guard} is None: {unknown}",
                ]
            else:
                made += [f"try: {targets} = {values}", f"except TypeError: {unknown}"]
        return made

    # What operands are in Python.

    def _predicate(self, text: str) -> str:
        found = NAME.match(text)
        assert found is not None, text
        letter, number = ("q" if found[2] == "UP" else "p"), found[3]
        if number == "T":
            return "False" if "!" in found[1] else "True"
        self.reads.add(f"{letter}{number}")
        place = f"{letter}[{number}]"
        return f"(None if {place} is None else not {place})" if "!" in found[1] else place

    def _value(self, text: str) -> str:
        """A 32-bit operand."""
        if found := NAME.match(text):
            if found[2] in ("P", "UP"):
                return self._predicate(text)
            letter = "u" if found[2] == "UR" else "r"
            number = (_ZERO_U if letter == "u" else _ZERO) if found[3] == "Z" else int(found[3])
            if found[3] != "Z":
                self.reads.add(f"{letter}{number}")
            return _with_sign(found[1], "0" if found[3] == "Z" else f"{letter}[{number}]")
        if found := _CONSTANT.match(text):
            word = self.constants.get(int(found[2], 16))
            return _with_sign(found[1], "None" if word is None else str(word))
        if found := re.match(r"^(-?)0x([0-9a-f]+)$", text):
            return str((-int(found[2], 16) if found[1] else int(found[2], 16)) & M)
        if text in ("SR_CTAID.X",):
            return "s.program_id"
        return str(SPECIAL.get(text, "None"))

    def _pair(self, text: str) -> str:
        """A 64-bit operand: two registers, or a number."""
        found = NAME.match(text)
        if found and found[2] in ("R", "UR"):
            if found[3] == "Z":
                return "0"
            letter, number = ("u" if found[2] == "UR" else "r"), int(found[3])
            self.reads |= {f"{letter}{number}", f"{letter}{number + 1}"}
            return _with_sign(found[1].replace("|", ""), f"H['at']({letter}, {number})")
        if found := _CONSTANT.match(text):
            low, high = (self.constants.get(int(found[2], 16) + k) for k in (0, 4))
            return "None" if low is None or high is None else str(high << 32 | low)
        value = self._value(text)
        return f"H['signed']({value})" if text.startswith("-") else value

    def _targets(self, text: str, words: int) -> list[str]:
        found = NAME.match(text)
        if found is None or found[3] in ("Z", "T"):
            return ["_"] * words
        letter = {"R": "r", "UR": "u", "P": "p", "UP": "q"}[found[2]]
        names = [int(found[3]) + k for k in range(words)]
        self.writes |= {f"{letter}{n}" for n in names}
        return [f"{letter}[{n}]" for n in names if n < (255 if letter == "r" else 63 if letter == "u" else 7)]

    def _set(self, target: str, value: str) -> None:
        (name,) = self._targets(target, 1) or ["_"]
        self.assignments.append((name, value))

    def _set_pair(self, target: str, value: str) -> None:
        names = self._targets(target, 2)
        self.assignments += [(names[0], f"({value}) & {M}"), (names[1], f"(({value}) >> 32) & {M}")]

    # Kinds of instruction.

    def _memory(self, operands: list[str]) -> None:
        one = self.one
        place = {"LDG": 1, "STG": 0, "LDGSTS": 1}[one.kind]
        if one.kind == "LDG":
            if is_predicate(operands[0]):
                place = 2
            words = max(1, one.width // 4)
            self.assignments += [(name, "None") for name in self._targets(operands[place - 1], words)]
        address = self._address(operands[place])
        call = "store" if one.kind == "STG" else "load"
        if address:
            self.steers = True
            self.effect = f"a = {address}; a is None or m.{call}(a, {one.width}, {one.address})"

    def _address(self, text: str) -> str:
        found = _ADDRESS.search(text)
        if found is None:
            return ""
        letter = "u" if found[1] == "UR" else "r"
        number, wide = found[2], ".64" in found[3]
        if number == "Z":
            return ""
        names = [f"{letter}{int(number) + k}" for k in range(2 if wide else 1)]
        self.reads |= set(names)
        tests = [f"{letter}[{int(number) + k}]" for k in range(len(names))]
        total = f"H['at']({letter}, {number})" if wide else f"{letter}[{number}]"
        if found[4]:
            uniform = int(found[4][2:])
            self.reads |= {f"u{uniform}", f"u{uniform + 1}"}
            tests += [f"u[{uniform}]", f"u[{uniform + 1}]"]
            total += f" + H['at'](u, {uniform})"
        if found[5]:
            total += f" + {int(found[5], 16)}"
        return f"None if None in ({', '.join(tests)},) else {total}"

    def _barrier(self, operands: list[str]) -> None:
        if "TRYWAIT" in self.flags:
            self.steers = True
            self._set(operands[0], "True")
            self.effect = "m.arrived()"
        elif "ARRIVE" in self.flags and len(operands) > 1 and NAME.match(operands[-1]):
            self.steers = True
            value = self._value(operands[-1])
            self.effect = f"{value} is None or m.expect({value})"

    def _compute(self, operands: list[str]) -> None:
        rule = RULES.get(self.name)
        if rule is not None:
            try:
                rule(self, operands)
                return
            except (IndexError, AssertionError, ValueError):
                self.assignments.clear()  # a form that the rule does not know
        self._unknown(operands)

    def _unknown(self, operands: list[str]) -> None:
        """Whatever it computes is unknown: its first operand, and predicates beside it."""
        words = max(1, self.one.width // 4) if self.one.kind in ("LDS", "LDC", "LDL", "LD") else 1
        if self.one.kind == "HGMMA":
            words = next((int(p.split("x")[1]) // 2 for p in self.flags if p.count("x") == 2), 1)
        elif self.one.kind == "HMMA" or "M88" in self.flags:
            words = 4
        elif self.name in ("DADD", "DMUL", "DFMA", "CS2R"):
            words = 2
        for text in operands[:2]:
            if is_predicate(text) and not text.startswith("!"):
                self._set(text, "None")
        first = next((text for text in operands if not is_predicate(text)), "")
        if (found := NAME.match(first)) and found[2] in ("R", "UR"):
            self.assignments += [(name, "None") for name in self._targets(first, words)]


def _with_sign(sign: str, value: str) -> str:
    if "~" in sign:
        return f"(~{value} & {M})"
    return f"({1 << 32} - {value})" if "-" in sign else value
