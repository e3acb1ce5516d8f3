"""The state of one call of fuse: what was asked, what was found, what was changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .report import Candidate
from .swap import swap

FilterFn = Callable[[str, nn.Module], bool]


@dataclass
class Run:
    """What one call of fuse was asked, has found and has changed.

    wanted: names of ops. found: (module's name, op) -> Candidate. changed: the modules to restore when this fuse is undone.
    """

    model: nn.Module
    wanted: set[str]
    filter_fn: FilterFn | None
    found: dict[tuple[str, str], Candidate] = field(default_factory=dict)
    changed: list[nn.Module] = field(default_factory=list)

    def left_out(self, op: str, name: str, module: nn.Module) -> str | None:
        """The reason when the caller does not want this module fused."""
        return f'"{op}" is not in ops' if op not in self.wanted else self.refused(name, module)

    def refused(self, name: str, module: nn.Module) -> str | None:
        return None if self.filter_fn is None or self.filter_fn(name, module) else "left out by filter_fn"

    def record(self, name: str, module: str, op: str, status: str, detail: str) -> None:
        """Enter a candidate in the report; module is the name its class had before."""
        self.found[name, op] = Candidate(name, module, op, status, detail)

    def swap(self, module: nn.Module, cls: type[nn.Module], **attributes: object) -> None:
        swap(module, cls, **attributes)
        self.changed.append(module)

    def candidates(self) -> list[Candidate]:
        """In the model's order."""
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        return sorted(self.found.values(), key=lambda c: order.get(c.name, len(order)))
