"""A launch counted: what its kernel's machine code holds, and what its programs execute, as numbers for the forecast."""

from __future__ import annotations

import re
import struct
from typing import Any

from .listing import Instruction, bytes_in_flight, loops, parse, stages_ahead
from .trace import POINTER_BITS, Program, Trace

PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}
"""Compute capability -> where a kernel's parameters begin in the constant bank."""
HOT = 256 * 1024  # bytes of a tensor that all programs read, and L1 keeps
ALIKE = 0.02  # relative difference of instructions between two programs that counts as none


def counted(listing: str, ptx: str, case: dict[str, Any]) -> dict[str, Any]:
    """The counts of a launch.

    case["launch"]: grid, the number of programs; values, the numbers that the kernel takes, by name; bytes, those of each
    tensor that it takes, by name. Compute capabilities without an entry in PARAMETERS raise KeyError.

    Of the first program, which has most to do, a warp's: instructions, outside (of loops of products), mufu, lds, sts, shfl,
    barriers. uneven: its instructions over the mean program's. flops and copied (bytes that tensor copies bring): of a program.
    drained: instructions inside loops of products that add up partial sums. bytes: of all tensors that the kernel touches.
    read: of those that it reads. again: bytes that all programs read a second time, and apart: that a program moves between.
    moved: bytes that a program reads and writes, of tensors that L1 does not hold; waits: how often it waits for a load into registers of
    such tensors, and hot_waits: of others.
    in_flight: bytes that a program has on the way at the most; ahead: groups of copies that it leaves there while it works.
    """
    instructions = parse(listing)
    launch, threads = case["launch"], 32 * case["num_warps"]
    constants, names = constant_bank(ptx, case)
    program = Program.of(instructions)
    first = program.follow(constants, 0)
    mean = _mean(program, constants, first, launch["grid"])
    touched = _touched(instructions, constants, names)
    sizes = {name: launch["bytes"].get(name, 0) for name in touched}
    whole = {n for n, name in enumerate(names) if name in sizes and sizes[name] * 8 >= max(sizes.values())}
    read = {names[n] for n in first.reads if n in range(len(names))} & set(touched)
    again = sum(first.again[n] for n in whole) * threads * launch["grid"]
    moved = sum(
        part[n] for part in (first.reads, first.writes) for n, name in enumerate(names) if launch["bytes"].get(name, 0) > HOT
    )
    hot = sum(times for n, times in first.waits.items() if n < 0 or launch["bytes"].get(names[n], 0) <= HOT)
    depths = " ".join(f"{loop.depth}:{loop.counts['instructions']}" for loop in loops(instructions))
    inside = first.counts - first.outside
    return {
        "static": len(instructions), "loops": depths, "instructions": first.counts["instructions"],
        "outside": first.outside["instructions"], "uneven": round(first.counts["instructions"] / mean, 4),
        "mufu": first.counts["MUFU"], "lds": first.counts["LDS"], "sts": first.counts["STS"], "shfl": first.counts["SHFL"],
        "barriers": first.counts["BAR"], "flops": _flops(first, case["num_warps"]), "copied": first.copied,
        "drained": inside["instructions"] if inside["FADD"] else 0, "bytes": sum(sizes.values()),
        "read": sum(sizes[name] for name in read), "again": again, "apart": first.apart * threads if again else 0,
        "in_flight": first.ahead or bytes_in_flight(instructions) * threads,
        "moved": moved * threads, "waits": sum(first.waits.values()) - hot, "hot_waits": hot, "ahead": stages_ahead(instructions), "unknown": first.unknown,
    }  # fmt: skip


def constant_bank(ptx: str, case: dict[str, Any]) -> tuple[dict[int, int], list[str]]:
    """(the words of the constant bank by offset, the tensors' names in the order of the parameters)."""
    launch = case["launch"]
    bank = {0x0: 32 * case["num_warps"], 0x4: 1, 0x8: 1, 0xC: launch["grid"], 0x10: 1, 0x14: 1, 0x28: 1 << 20}
    arguments = list(case["signature"].items())
    offset, names = PARAMETERS[case["arch"]], []
    for number, text in enumerate(re.findall(r"^\s*\.param \.[a-z](\d+)", ptx, re.MULTILINE)):
        size = int(text) // 8
        offset = -(-offset // size) * size
        name, kind = arguments[number] if number < len(arguments) else ("scratch", "*i8")
        if kind.startswith("*"):
            names.append(name)
            value = len(names) << POINTER_BITS
        else:
            value = launch["values"][name]
            value = struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else value
        bank[offset] = value & 0xFFFFFFFF
        if size == 8:
            bank[offset + 4] = value >> 32 & 0xFFFFFFFF
        offset += size
    return bank, names


def _touched(instructions: list[Instruction], constants: dict[int, int], names: list[str]) -> list[str]:
    """The tensors whose addresses the kernel reads from its parameters."""
    used: set[int] = set()
    for one in instructions:
        for text in re.findall(r"c\[0x0\]\[0x([0-9a-f]+)\]", " ".join(one.operands)):
            start = int(text, 16)
            used |= set(range(start, start + max(4, one.width if one.kind.startswith(("LDC", "ULDC")) else 8), 4))
    found = {constants[at + 4] >> POINTER_BITS - 32 for at in used if constants.get(at) == 0 and at + 4 in constants}
    return [name for n, name in enumerate(names) if n + 1 in found and name != "scratch"]


def _flops(trace: Trace, warps: int) -> int:
    """Of a program: an HGMMA is of four warps, an HMMA of each."""
    return trace.flops * (max(1, warps // 4) if trace.counts["HGMMA"] else warps)


def _mean(program: Program, constants: dict[int, int], first: Trace, grid: int) -> float:
    """Instructions of the mean program, where the first ones have as many as the first, and all others as the last."""
    most = first.counts["instructions"]
    last = program.follow(constants, grid - 1).counts["instructions"]
    if grid == 1 or abs(most - last) <= ALIKE * most:
        return float(most)
    low, high = 0, grid - 1  # low is like the first, high is not
    while high - low > 1:
        middle = (low + high) // 2
        alike = abs(program.follow(constants, middle).counts["instructions"] - most) <= ALIKE * most
        low, high = (middle, high) if alike else (low, middle)
    return (high * most + (grid - high) * last) / grid
