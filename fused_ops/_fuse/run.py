"""The state of one call of fuse: what was asked, what was found, what is to be changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .report import ALREADY, FUSED, LEFT, Candidate
from .swap import Class, class_of, next_run, restore, swap

FilterFn = Callable[[str, nn.Module], bool]


class Run:
    """What one call of fuse was asked, has found, and will change once everything is found.

    wanted: names of ops. changed: the modules to restore when this fuse is undone. used: ids of the Linears that a fused call
    takes. follows: id of a Linear -> what follows it in the source, where that is no activation.
    """

    def __init__(self, model: nn.Module, wanted: set[str], filter_fn: FilterFn | None) -> None:
        self.model = model
        self.wanted = wanted
        self.filter_fn = filter_fn
        self.number = next_run()
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.changed: list[nn.Module] = []
        self.used: set[int] = set()
        self.follows: dict[int, str] = {}
        self._found: dict[tuple[str, str, str], Candidate] = {}
        self._rows: set[tuple[str, str]] = set()
        self._refused: dict[int, str | None] = {}
        self._planned: list[tuple[nn.Module, Class, dict[str, Any], tuple[str, ...]]] = []

    def left_out(self, op: str, module: nn.Module) -> str | None:
        """The reason when the caller does not want this module fused."""
        return f'"{op}" is not in ops' if op not in self.wanted else self.refuses(module)

    def refuses(self, module: nn.Module) -> str | None:
        """The reason when filter_fn, which is asked once for each module, does not want it fused."""
        if self.filter_fn is None:
            return None
        if id(module) not in self._refused:
            allowed = self.filter_fn(self.names.get(id(module), ""), module)
            self._refused[id(module)] = None if allowed else "left out by filter_fn"
        return self._refused[id(module)]

    def record(self, name: str, module: str, op: str, status: str, detail: str, count: int = 0, key: str = "") -> None:
        """Enter a candidate in the report; module is the name of its class.

        Of two for one key the one that fuses more stays, then the one that runs.
        """
        rank = (LEFT, FUSED, ALREADY)
        before = self._found.get((name, op, key))
        if before is None or (rank.index(status), count) >= (rank.index(before.status), before.count):
            self._found[name, op, key] = Candidate(name, module, op, status, detail, count)
            self._rows.add((name, op))

    def has(self, name: str, op: str) -> bool:
        return (name, op) in self._rows

    def plan(self, module: nn.Module, put: Class, remove: tuple[str, ...] = (), **attributes: Any) -> None:
        """Have module changed by apply, unless it is that already."""
        if class_of(module) != put or remove or any(module.__dict__.get(k) != v for k, v in attributes.items()):
            self._planned.append((module, put, attributes, remove))

    def apply(self) -> None:
        """Change every module that was planned, or none."""
        try:
            for module, put, attributes, remove in self._planned:
                self.changed.append(module)  # first: an interrupt may come within swap
                swap(self.number, module, put, remove, **attributes)
        except BaseException:
            for module in self.changed:
                restore(module, self.number)
            raise

    def candidates(self) -> list[Candidate]:
        """In the model's order."""
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        return sorted(self._found.values(), key=lambda c: order.get(c.name, len(order)))
