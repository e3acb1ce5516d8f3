"""PTX text to instructions: the subset that Triton emits, one entry function a module."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

CLASSES = {"pred": "pred", "b16": "b16", "b32": "b32", "b64": "b64", "u16": "b16", "u32": "b32", "u64": "b64",
           "s16": "b16", "s32": "b32", "s64": "b64", "f32": "b32", "f64": "b64"}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A register by its number in the program."""

    index: int


@dataclass(frozen=True)
class Address:
    """[base + offset], for tensor copies [base, {coordinates}]. base: a register, a parameter's or symbol's name, or an int."""

    base: Register | str | int
    offset: int = 0
    coordinates: tuple[Register | int, ...] = ()


Operand = Any  # Register | Address | int | str, a symbol or label | tuple, a vector {a, b} or a pair a|b


@dataclass(frozen=True)
class Instruction:
    """op: the mnemonic split at its dots. guard: (predicate, whether it is negated), or None."""

    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    text: str


@dataclass
class Program:
    """An entry function. classes: the class of each register: pred, b16, b32 or b64. labels: name to instruction number."""

    name: str
    parameters: list[str] = field(default_factory=list)
    threads: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)


class Parser:
    """Parses one module's text."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        head = re.search(r"\.entry\s+(\S+)\s*\((.*?)\)(.*?)\{", text, re.S)
        if head is None:
            raise ValueError("no entry function")
        self.program = Program(head[1], re.findall(r"\.param\s[^,]*?(\w+)\s*(?:,|$)", head[2].strip()))
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
        self.program.threads = int(threads[1]) if threads else 0
        self.scopes: list[dict[str, str]] = [{}]
        self.registers: dict[str, Register] = {}
        self.ranges: dict[str, str] = {}
        self._body(re.sub(r"^\s*\.(?:loc|file|section|pragma)\b[^\n]*$", "", text[head.end() :], flags=re.M))

    def _body(self, body: str) -> None:
        position, depth = 0, 1
        token = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
        while depth:
            found = token.match(body, position)
            if found is None:
                raise ValueError(f"not understood: {body[position : position + 80].strip()!r}")
            position = found.end()
            brace, label, statement = found.groups()
            if brace == "{":
                depth += 1
                self.scopes.append({})
            elif brace == "}":
                depth -= 1
                self.scopes.pop()
            elif label:
                unique = f"{label}@{len(self.program.instructions)}" if len(self.scopes) > 1 else label
                self.scopes[-1][label] = unique
                self.program.labels[unique] = len(self.program.instructions)
            elif statement.strip():
                self._statement(" ".join(statement.split()))

    def _statement(self, text: str) -> None:
        if text.startswith("."):
            declared = re.match(r"\.reg \.(\w+) (.*)", text)
            if declared is not None:
                for name in declared[2].split(","):
                    self._declare(CLASSES[declared[1]], name.strip())
            return
        guarded = re.match(r"@(!?)(\S+) (.*)", text)
        guard = (self._register(guarded[2]), guarded[1] == "!") if guarded else None
        mnemonic, _, rest = (guarded[3] if guarded else text).partition(" ")
        operands = tuple(self._operand(part) for part in split(rest))
        op = tuple(part for part in re.split(r"\.(?!:)", mnemonic) if part)
        self.program.instructions.append(Instruction(op, operands, guard, text))

    def _declare(self, kind: str, name: str) -> None:
        many = re.fullmatch(r"(%\w+?)<(\d+)>", name)
        if many:
            self.ranges[many[1]] = kind
            return
        unique = f"{name}@{len(self.registers)}" if len(self.scopes) > 1 else name
        self.scopes[-1][name] = unique
        self._add(unique, kind)

    def _add(self, name: str, kind: str) -> Register:
        self.registers[name] = Register(len(self.program.classes))
        self.program.classes.append(kind)
        return self.registers[name]

    def _register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            name = scope.get(name, name)
        if name in self.registers:
            return self.registers[name]
        kind = self.ranges.get(re.sub(r"\d+$", "", name))
        if kind is None:
            raise ValueError(f"no register {name!r}")
        return self._add(name, kind)

    def _operand(self, text: str) -> Operand:
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if text.startswith("{"):
            return tuple(self._operand(part) for part in split(text[1:-1]))
        if "|" in text:
            return tuple(self._operand(part.strip()) for part in text.split("|"))
        number = integer(text)
        if number is not None:
            return number
        if re.fullmatch(r"%(?:tid|ntid|ctaid|nctaid|laneid|n?cluster\w*)(?:\.[xyz])?", text):
            return text
        try:
            return self._register(text)
        except ValueError:
            for scope in reversed(self.scopes):
                text = scope.get(text, text)
            return text  # a label, a symbol or "_"

    def _address(self, text: str) -> Address:
        first, *others = split(text)
        base, _, offset = (part.strip() for part in first.partition("+"))
        coordinates = self._operand(others[0]) if others else ()
        return Address(self._operand(base), integer(offset) or 0, coordinates)


def integer(text: str) -> int | None:
    """The bits of an immediate, or None. Floats are 0f and eight digits, or 0d and sixteen."""
    if found := re.fullmatch(r"0[fd]([0-9a-fA-F]+)", text):
        return int(found[1], 16)
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return None


def split(text: str) -> list[str]:
    """text at its commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]
