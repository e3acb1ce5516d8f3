"""The kernels that Inductor makes of a few steps, and the bytes that they move: what `compile_choice` decides by.

A model of Inductor's fusion, in plain Python. A pointwise step is computed where it is read, and written only where something
that is no part of a kernel reads it. What reads one tensor, or reads what the other writes, shares a kernel where both go over
the same rows. A call (a product, an operator of ours) is its own kernels, and fuses with nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Inductor keeps a row of up to this many numbers in registers (a "persistent reduction"). It reads a longer one again for what
# depends on the row's sum.
PERSISTENT = 1024


@dataclass(frozen=True)
class Step:
    """One step: a tensor, and how it comes about.

    kind: "pointwise"; "row" or "column", a reduction over the last dimensions, or over others; "call"; "part", one of the tensors
    that a call gives; "buffer", a tensor that is there already. inputs: names of steps. bytes and numel: of the tensor, and for a
    call the bytes of all that it writes. over: of a reduction, how many numbers become one. kept: something else reads the tensor
    too. kernels: of a call.
    """

    kind: str
    inputs: tuple[str, ...] = ()
    bytes: int = 0
    numel: int = 0
    over: int = 1
    kept: bool = False
    kernels: int = 1

    @property
    def reduces(self) -> bool:
        """Whether it is a reduction."""
        return self.kind in ("row", "column")


@dataclass(frozen=True)
class Cost:
    """What some steps cost: how many kernels are launched, and how many bytes they read and write."""

    kernels: int
    bytes: int

    def within(self, other: Cost) -> bool:
        """Whether neither number is larger than the other's."""
        return self.kernels <= other.kernels and self.bytes <= other.bytes

    def __str__(self) -> str:
        return f"{self.kernels} kernel{'s' * (self.kernels != 1)}, {self.bytes:,} bytes"


def count(steps: Mapping[str, Step]) -> Cost:
    """The kernels and bytes of steps, which are in an order in which each comes after its inputs."""
    return _Count(steps).cost()


class _Count:
    """The fusion of some steps. roots: the steps that have a kernel; groups: the kernels, as sets of roots."""

    def __init__(self, steps: Mapping[str, Step]) -> None:
        live = _live(steps)
        self.steps = {name: step for name, step in steps.items() if name in live}
        called = {name for step in self.steps.values() if step.kind == "call" for name in step.inputs}
        self.roots = [
            name
            for name, step in self.steps.items()
            if step.reduces or (step.kind == "pointwise" and (step.kept or name in called))
        ]
        self.sources = {name: self._sources(name) for name in self.roots}
        self.before: dict[str, set[str]] = {}
        for name, step in self.steps.items():
            self.before[name] = {name}.union(*(self.before[i] for i in step.inputs))

    def _sources(self, root: str) -> set[str]:
        """What the kernel of root reads: tensors, and other roots."""
        found: set[str] = set()
        todo = list(self.steps[root].inputs)
        while todo:
            name = todo.pop()
            if self.steps[name].kind == "pointwise" and name not in self.roots:
                todo += self.steps[name].inputs
            else:
                found.add(name)
        return found

    def cost(self) -> Cost:
        groups = self._groups()
        calls = [step for step in self.steps.values() if step.kind == "call"]
        moved = sum(step.bytes + sum(self.steps[i].bytes for i in set(step.inputs)) for step in calls)
        return Cost(len(groups) + sum(c.kernels for c in calls), moved + sum(self._bytes(group) for group in groups))

    def _groups(self) -> list[set[str]]:
        groups: list[set[str]] = []
        for root in self.roots:
            joined = {root}
            for group in [g for g in groups if self._near(root, g)]:
                if self._fits(joined, group) and not self._between(joined, group) and not self._between(group, joined):
                    groups.remove(group)
                    joined |= group
            groups.append(joined)
        return groups

    def _near(self, root: str, group: set[str]) -> bool:
        """Whether root reads what the group computes, or a tensor that it reads too."""
        read = self.sources[root]
        return not read.isdisjoint(group) or any(not read.isdisjoint(self.sources[member]) for member in group)

    def _fits(self, a: set[str], b: set[str]) -> bool:
        """Whether one kernel can go over the rows of both: its reductions are alike, and the rest has their elements or rows."""
        steps = [self.steps[name] for name in a | b]
        reductions = {(step.kind, step.numel, step.over) for step in steps if step.reduces}
        sizes = {step.numel for step in steps if not step.reduces}
        if not reductions:
            return len(sizes) == 1
        if len(reductions) > 1:
            return False
        kind, rows, over = reductions.pop()
        return sizes <= ({rows, rows * over} if kind == "row" else {rows})

    def _between(self, first: set[str], then: set[str]) -> bool:
        """Whether a call reads what first computes and then reads what the call gives: they are two kernels."""
        return any(
            step.kind == "call" and not self.before[call].isdisjoint(first)
            for name in then
            for call in self.before[name]
            for step in (self.steps[call],)
        )

    def _bytes(self, group: set[str]) -> int:
        read = set().union(*(self.sources[name] for name in group)) - group
        elsewhere = set().union(*(self.sources[r] for r in self.roots if r not in group))
        elsewhere |= {i for step in self.steps.values() if step.kind == "call" for i in step.inputs}
        written = [name for name in group if self.steps[name].kept or not self.steps[name].reduces or name in elsewhere]
        return sum(self.steps[name].bytes for name in (*read, *written, *self._read_again(group, read)))

    def _read_again(self, group: set[str], read: set[str]) -> Iterator[str]:
        """What a kernel over rows too long for registers reads twice: once for the row's sum, once for what depends on it."""
        reductions = [name for name in group if self.steps[name].kind == "row"]
        if reductions and self.steps[reductions[0]].over > PERSISTENT:
            whole = self.steps[reductions[0]].numel * self.steps[reductions[0]].over
            if any(not self.before[name].isdisjoint(set(reductions) - {name}) for name in group):
                yield from (name for name in read if self.steps[name].numel == whole)


def _live(steps: Mapping[str, Step]) -> set[str]:
    """The steps whose results something reads."""
    live: set[str] = set()
    for name, step in reversed(list(steps.items())):
        if step.kept or name in live:
            live.add(name)
            live.update(step.inputs)
    return live
