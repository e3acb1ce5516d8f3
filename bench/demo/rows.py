"""What the demo measured: one Row a measurement, with the bound it is held to."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

RELATIONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True)
class Row:
    """One measurement. measured is None where the step failed before it could measure; note then says how."""

    step: str
    check: str
    measured: float | None
    relation: str
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """False for NaN too: no comparison with NaN holds."""
        return self.measured is not None and RELATIONS[self.relation](self.measured, self.bound)

    @property
    def missed_by(self) -> float | None:
        """How far outside the bound the measurement is; None where it is inside or there is none."""
        return None if self.passed or self.measured is None else abs(self.measured - self.bound)

    def verdict(self) -> str:
        if self.passed:
            return "ok"
        return "NOT MEASURED" if self.missed_by is None else f"MISSED by {number(self.missed_by)}"

    def as_dict(self) -> dict[str, Any]:
        finite = self.measured is not None and math.isfinite(self.measured)
        missed = self.missed_by if self.missed_by is not None and math.isfinite(self.missed_by) else None
        return {**asdict(self), "measured": self.measured if finite else None, "passed": self.passed, "missed_by": missed}


def failed(step: str, error: BaseException | str) -> Row:
    """The row of a step that raised: it has no measurement, and so it does not pass."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Row(step, "completed", None, "==", 1.0, text.strip()[-600:])


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e12 else f"{value:.2e}"


def table(rows: Iterable[Row], title: str) -> Table:
    result = Table(title=title)
    for column in ("step", "check", "measured", "bound", "verdict", "note"):
        numeric = column in ("measured", "bound")
        result.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    before = ""
    for row in rows:
        if before and row.step != before:
            result.add_section()
        step = row.step if row.step != before else ""
        before = row.step
        style = "green" if row.passed else "bold red"
        verdict = f"[{style}]{row.verdict()}[/]"
        bound = f"{row.relation} {number(row.bound)}"
        result.add_row(step, escape(row.check), number(row.measured), bound, verdict, escape(row.note))
    return result
