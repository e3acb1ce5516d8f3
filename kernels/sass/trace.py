"""How often a program of a launch executes each instruction, found by following one thread through the machine code (SASS).

Only what steers the thread is computed: the integers that branches and addresses are made of, from the launch's sizes and
the program's number. Everything else is unknown. So a loop has the trips that it has in the launch, however the compiler
unrolled it, and whoever wrote the kernel. A branch on something unknown is not taken, and counted: where a value decides, the
ordinary path is the one that falls through. A wait for a barrier ends at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import integers
from .listing import Instruction, count, loops, read, written

MOST_STEPS = 4_000_000  # blocks; a loop that never ends is an error
MOST_AROUND = 64  # instructions a product, in a loop of products
POINTER_BITS = 40  # tensor number i lies at (i + 1) << 40


@dataclass
class Trace:
    """What one program executes.

    counts: instructions of its first warp, in all and by kind (see sass.count). outside: the same but for loops of tensor core
    products. flops: of its products, by all warps of a group together. reads, writes: bytes that a thread moves, by the number
    of the tensor among the kernel's pointers. again: bytes that it reads from places that it has read before, and apart: the
    most bytes between two such reads. waits: how often it waits for a load of each tensor. copied: bytes that it awaits of tensor copies (TMA), and ahead: the most at once.
    unknown: branches on something unknown.
    """

    counts: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    reads: Counter[int] = field(default_factory=Counter)
    writes: Counter[int] = field(default_factory=Counter)
    again: Counter[int] = field(default_factory=Counter)
    apart: int = 0
    waits: Counter[int] = field(default_factory=Counter)
    copied: int = 0
    ahead: int = 0
    unknown: int = 0


class Memory:
    """What a thread's accesses to global memory touch; the code that `integers` makes calls it."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.clock = trace, 0
        self.seen: dict[int, int] = {}
        self.waiting: list[int] = []
        self.sites: dict[int, int] = {}  # address of a load -> the tensor that it reads

    def load(self, address: int, width: int, site: int) -> None:
        tensor = (address >> POINTER_BITS) - 1
        self.sites[site] = tensor
        self.trace.reads[tensor] += width
        before = self.seen.get(address)
        if before is not None:
            self.trace.again[tensor] += width
            self.trace.apart = max(self.trace.apart, self.clock - before)
        self.clock += width
        self.seen[address] = self.clock

    def store(self, address: int, width: int, site: int) -> None:
        self.trace.writes[(address >> POINTER_BITS) - 1] += width
        self.clock += width

    def expect(self, nbytes: int) -> None:
        """A barrier that awaits so many bytes of copies."""
        self.trace.copied += nbytes
        self.waiting.append(nbytes)
        self.trace.ahead = max(self.trace.ahead, sum(self.waiting))

    def arrived(self) -> None:
        """The oldest copy has come."""
        del self.waiting[:1]


Access = tuple[frozenset[int], tuple[int, ...], int]  # registers read that loads write; that a load here writes; its address


@dataclass(frozen=True)
class Program:
    """A kernel made ready to be followed: its blocks, and the code that computes what steers a thread through each."""

    instructions: Sequence[Instruction]
    starts: Mapping[int, int]
    blocks: Sequence[tuple[int, int]]
    products: frozenset[int]  # blocks inside loops of products
    loads: Sequence[tuple[bool, list[Access]]]
    counts: Sequence[Counter[str]]
    code: dict[tuple[tuple[int, int], ...], list[integers.Block]] = field(default_factory=dict)  # by the constants

    @classmethod
    def of(cls, instructions: Sequence[Instruction]) -> Program:
        """Cut the instructions into blocks."""
        leaders = {0}
        index = {one.address: i for i, one in enumerate(instructions)}
        for i, one in enumerate(instructions):
            if one.kind in ("BRA", "EXIT", "CALL", "RET", "BRX"):
                leaders.add(i + 1)
                if one.target in index:
                    leaders.add(index[one.target])
        cuts = sorted(leader for leader in leaders if leader < len(instructions))
        blocks = list(zip(cuts, [*cuts[1:], len(instructions)]))
        starts = {instructions[a].address: n for n, (a, _) in enumerate(blocks)}
        loaded = {n for one in instructions if one.kind == "LDG" for n in written(one)}
        loads = [_loads(instructions[a:b], loaded) for a, b in blocks]
        counts = [count(instructions[a:b]) for a, b in blocks]
        return cls(instructions, starts, blocks, frozenset(_product_blocks(instructions, blocks)), loads, counts)

    def follow(self, constants: Mapping[int, int], program_id: int) -> Trace:
        """Follow thread 0 of a program.

        constants: the words of the constant bank, by offset: sizes of the launch and the kernel's arguments.
        Raises RuntimeError where it does not end.
        """
        trace = Trace()
        memory = Memory(trace)
        key = tuple(sorted(constants.items()))
        if key not in self.code:
            self.code[key] = integers.compiled(self.instructions, self.blocks, constants)
        code, state = self.code[key], integers.State(memory, program_id)
        executed: Counter[int] = Counter()
        loads, waits = self.loads, Waits()
        at, calls = 0, []  # type: ignore[var-annotated]
        for _ in range(MOST_STEPS):
            executed[at] += 1
            code[at](state)
            if loads[at][0] or waits.pending:
                waits.walk(loads[at][1])
            last = self.instructions[self.blocks[at][1] - 1]
            taken = state.taken
            if taken is None:
                trace.unknown += 1
            if taken and last.kind == "EXIT":
                break
            if taken and last.kind == "RET":
                at = calls.pop()
            elif taken and last.kind in ("BRA", "CALL") and last.target in self.starts:
                if last.kind == "CALL":
                    calls.append(at + 1)
                at = self.starts[last.target]
            else:
                at += 1
            if at >= len(self.blocks):
                break
        else:
            raise RuntimeError(f"a program does not end within {MOST_STEPS} blocks")
        self._add(trace, executed)
        for site, times in waits.sites.items():
            trace.waits[memory.sites.get(site, -1)] += times
        return trace

    def _add(self, trace: Trace, executed: Counter[int]) -> None:
        for block, times in executed.items():
            inside = self.instructions[slice(*self.blocks[block])]
            for kind, number in self.counts[block].items():
                trace.counts[kind] += number * times
                if block not in self.products:
                    trace.outside[kind] += number * times
            if self.counts[block]["HGMMA"] or self.counts[block]["HMMA"]:
                trace.flops += times * sum(flops_of(one) for one in inside)


def _loads(block: Sequence[Instruction], loaded: set[int]) -> tuple[bool, list[Access]]:
    """(whether a block loads, each of its instructions that loads or reads what a load has brought)."""
    accesses: list[Access] = []
    for one in block:
        uses = frozenset(loaded & read(one))
        brings = written(one) if one.kind == "LDG" else ()
        if uses or brings:
            accesses.append((uses, brings, one.address))
    return any(brings for _, brings, _ in accesses), accesses


class Waits:
    """How often a thread waits for memory: loads that were made before it last waited have come by the time that it reads them."""

    def __init__(self) -> None:
        self.sites: Counter[int] = Counter()  # by the load that was waited for
        self.count = 0
        self.pending: dict[int, tuple[int, int]] = {}  # register -> how often the thread had waited at its load, which load

    def walk(self, accesses: list[Access]) -> None:
        """Go through a block."""
        pending = self.pending
        for uses, brings, site in accesses:
            waited = [load for n in uses if n in pending and (load := pending.pop(n))[0] == self.count]
            if waited:
                self.sites[waited[-1][1]] += 1
                self.count += 1
            for n in brings:
                pending[n] = (self.count, site)


def flops_of(one: Instruction) -> int:
    """FLOPs of a tensor core instruction: of a group of four warps (HGMMA), or of one warp (HMMA)."""
    if one.kind == "HGMMA":
        shape = next(part for part in one.opcode.split(".") if part.count("x") == 2)
        m, n, k = map(int, shape.split("x"))
        return 2 * m * n * k
    if one.kind == "HMMA":
        digits = next((part for part in one.opcode.split(".") if part.isdigit()), "16816")
        k = {"1684": 4, "1688": 8, "16816": 16, "16832": 32}.get(digits, 16)
        return 2 * 16 * 8 * k
    return 0


def _product_blocks(instructions: Sequence[Instruction], blocks: Sequence[tuple[int, int]]) -> set[int]:
    """The blocks inside loops that do little else than products on tensor cores."""
    found: set[int] = set()
    for loop in loops(instructions):
        products = loop.counts["HGMMA"] + loop.counts["HMMA"]
        if products and loop.counts["instructions"] <= MOST_AROUND * products:
            found |= {n for n, (i, _) in enumerate(blocks) if loop.start <= instructions[i].address <= loop.end}
    return found
