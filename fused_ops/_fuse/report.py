"""What fuse(model) did: one Candidate a module it looked at, and the FuseReport that prints them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from .._torch.spec import REGISTRY
from .count import KINDS, count
from .swap import restore_all

FUSED, ALREADY, LEFT = "fused", "already fused", "not fused"


@dataclass(frozen=True)
class Candidate:
    """One module that fuse looked at.

    name: its path in the model ("" is the model itself). op: what it was a candidate for. status: "fused",
    "already fused" or "not fused". detail: what it became, or why it was left alone. count: how many operations of op it is
    in one forward; 0 for a Linear that no activation follows, and for what the present configuration does not call.
    """

    name: str
    module: str
    op: str
    status: str
    detail: str
    count: int = 0


class FuseReport:
    """Every candidate and what became of it. Prints as a table; also a context manager that undoes this fuse on leaving.

    with fuse(model) as report: the model is fused inside the block only.
    """

    def __init__(self, model: nn.Module, candidates: list[Candidate], changed: list[nn.Module], run: int) -> None:
        self.model = model
        self.candidates = candidates
        self._changed = changed
        self._run = run

    @property
    def fused(self) -> list[Candidate]:
        """The candidates that are fused now, by this call or an earlier one."""
        return [c for c in self.candidates if c.status in (FUSED, ALREADY)]

    @property
    def skipped(self) -> list[Candidate]:
        """The candidates left alone; detail says why."""
        return [c for c in self.candidates if c.status == LEFT]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    def __enter__(self) -> FuseReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        names = {id(module): name for name, module in self.model.named_modules()}
        restore_all([(names.get(id(module), "a part"), module) for module in self._changed], self._run)
        self._changed.clear()

    def coverage(self, *args: Any, **kwargs: Any) -> dict[str, tuple[int, int]]:
        """{op: (fused, all)}: of the operations of each kind that one forward computes, how many a fused function computes.

        Args:
            args, kwargs: example inputs of the model. With them one forward runs, without gradients, and its operations are
                counted as they run: what no row of the report knows counts too. Without them the report's own rows are
                counted: a module that is called twice, or not at all, counts once.

        Kinds: the ops that have a fused function, of a Linear only where an activation follows it. A softmax inside
        scaled_dot_product_attention is none; a whole MLP in one call is one Linear with its activation.
        """
        if args or kwargs:
            return {op: found for op, found in count(self.model, args, kwargs).items() if op in REGISTRY}
        counts = {op: (0, 0) for op in KINDS if op in REGISTRY}
        for candidate in self.candidates:
            if candidate.op in counts:
                done, total = counts[candidate.op]
                counts[candidate.op] = (done + (candidate.status != LEFT) * candidate.count, total + candidate.count)
        return counts

    def counts(self) -> dict[str, tuple[int, int]]:
        """{op: (fused, candidates)}."""
        counts: dict[str, tuple[int, int]] = {}
        for candidate in self.candidates:
            done, total = counts.get(candidate.op, (0, 0))
            counts[candidate.op] = (done + (candidate.status != LEFT), total + 1)
        return counts

    def rows(self, every: bool = False) -> list[tuple[str, str, str, str, str]]:
        """(name, module, op, status, detail); modules that differ by a layer's number are one row unless every is true."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for c in self.candidates:
            name, detail = c.name, c.detail
            if not every:
                name, detail = (re.sub(r"(?<![^.])\d+(?![^.])", "*", text) for text in (name, detail))
            groups.setdefault((name, c.module, c.op, c.status, detail), []).append(c.name)
        return [
            (f"{name} x{len(names)}" if len(names) > 1 else names[0] or "(the model)", module, op, status, detail)
            for (name, module, op, status, detail), names in groups.items()
        ]

    def summary(self) -> str:
        parts = [f"{op} {done}/{total}" for op, (done, total) in self.counts().items()]
        return f"{type(self.model).__name__}: {len(self.fused)} of {len(self)} candidates fused" + (
            f" ({', '.join(parts)})" if parts else ""
        )

    def table(self, every: bool = False) -> str:
        """The report as text; every=True gives one row a module."""
        header = ("name", "module", "op", "status", "what, or why not")
        rows = [header, *self.rows(every)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        rule = "  ".join("-" * width for width in widths[:-1]) + "  " + "-" * len(header[-1])
        return "\n".join([self.summary(), "", lines[0], rule, *lines[1:]])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<FuseReport {self.summary()}>"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.summary())
        for column in ("name", "module", "op", "status", "what, or why not"):
            table.add_column(column, overflow="fold")
        style = {FUSED: "green", ALREADY: "green", LEFT: "yellow"}
        for row in self.rows():
            table.add_row(*row[:3], f"[{style[row[3]]}]{row[3]}[/]", row[4])
        return table
