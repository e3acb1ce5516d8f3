"""The committed table of what the headline rows' launches cost: headline-<Triton's minor version>.csv beside this file.

`fused-ops audit --headline --write-table` writes it; `fused-ops audit --headline` and a test hold it to what is compiled.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .audit import run_audit
from .forecast.counted import Counted
from .headline import SXM, Row, counting_case, headline_rows, launches_of
from .launches import AtenCall, Gpu, Launch
from .occupancy import minor

FOLDER = Path(__file__).parent
KEY = ("op", "case", "dtype", "pass")
FIELDS = tuple(field.name for field in dataclasses.fields(Counted))
INSTRUCTIONS_ROSE = 1.05  # a factor of instructions an element that is no accident of the compiler's
Key = tuple[str, str, str, str]
HeadlineTable = dict[Key, list[Counted]]


def table_of(triton: str) -> Path:
    """Where the table of a Triton is."""
    return FOLDER / f"headline-{minor(triton)}.csv"


def count(
    rows: Sequence[Row],
    gpu: Gpu = SXM,
    jobs: int | None = None,
    python: str | None = None,
    done: Callable[[], None] = lambda: None,
) -> tuple[HeadlineTable, str]:
    """(what the rows' launches cost, the Triton that compiled them). Every launch is compiled once.

    Raises RuntimeError where a kernel does not compile or cannot be counted.
    """
    return count_launches(listed_rows(rows, gpu), gpu, jobs, python, done)


def listed_rows(rows: Sequence[Row], gpu: Gpu = SXM) -> dict[Key, list[Launch | AtenCall]]:
    """What each row launches, once where two rows differ only in what is measured."""
    launches: dict[Key, list[Launch | AtenCall]] = {}
    for row in rows:
        if row.key not in launches:
            launches[row.key] = launches_of(row, gpu)
    return launches


def count_launches(
    launches: Mapping[Key, Sequence[Launch | AtenCall]], gpu: Gpu = SXM, jobs: int | None = None, python: str | None = None,
    done: Callable[[], None] = lambda: None,
) -> tuple[HeadlineTable, str]:  # fmt: skip
    """count, of launches that are known."""
    cases: dict[str, dict[str, Any]] = {}
    for one in itertools.chain.from_iterable(launches.values()):
        if isinstance(one, Launch):
            case = counting_case(one, gpu)
            cases.setdefault(repr(case), case)
    compiled = run_audit(list(cases.values()), jobs, python, done) if cases else []
    counted = {}
    for (text, case), audited in zip(cases.items(), compiled):
        if audited.error or audited.skipped:
            raise RuntimeError(f"{audited.kernel} {audited.config}: {audited.error or audited.skipped}")
        counted[text] = Counted.of(dataclasses.asdict(audited), case)

    def of(one: Launch | AtenCall) -> Counted:
        if isinstance(one, AtenCall):
            return Counted.aten(one.name, one.nbytes, one.itemsize, one.product)
        return counted[repr(counting_case(one, gpu))]

    return {key: [of(one) for one in part] for key, part in launches.items()}, compiled[0].triton if compiled else ""


def load(path: Path) -> HeadlineTable:
    """A table from its file; empty where there is none. Raises ValueError where it is no table."""
    table: HeadlineTable = {}
    if not path.exists():
        return table
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                one = Counted.parsed(row)
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            table.setdefault((row["op"], row["case"], row["dtype"], row["pass"]), []).append(one)
    return table


def save(table: Mapping[Key, Sequence[Counted]], path: Path) -> None:
    """Write a table; the file appears whole or not at all."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*KEY, *FIELDS])
    for key, launches in table.items():
        writer.writerows([*key, *(getattr(one, name) for name in FIELDS)] for one in launches)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, newline="") as file:
        file.write(out.getvalue())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def worse(before: Counted, after: Counted) -> list[str]:
    """What a launch costs more than the table says: fewer programs an SM, spills, 5% more instructions an element, more
    barriers a row, fewer bytes on the way."""
    said = []
    if after.programs_per_sm < before.programs_per_sm:
        why = f" ({before.registers} registers became {after.registers})" if after.registers > before.registers else ""
        said.append(f"an SM holds {after.programs_per_sm} programs, {before.programs_per_sm} by the table{why}")
    if after.spill_bytes > before.spill_bytes:
        said.append(f"spills {after.spill_bytes} bytes a thread, {before.spill_bytes} by the table")
    old, new = before.instructions_per_element, after.instructions_per_element
    if new > INSTRUCTIONS_ROSE * old:
        said.append(f"{new:.1f} instructions an element, {old:.1f} by the table")
    if after.barriers_per_row > before.barriers_per_row * 1.001:
        said.append(f"{after.barriers_per_row:.2f} barriers a row, {before.barriers_per_row:.2f} by the table")
    old_bytes, new_bytes = (one.in_flight * one.programs_per_sm for one in (before, after))
    if new_bytes < old_bytes:
        said.append(f"{new_bytes} bytes on the way an SM, {old_bytes} by the table")
    return said


def findings(found: Mapping[Key, Sequence[Counted]], table: Mapping[Key, Sequence[Counted]]) -> list[tuple[Key, str, str]]:
    """(row, kernel, what is worse) of everything that was counted, against a table."""
    said = []
    for key, launches in found.items():
        known = table.get(key)
        if known is None or [one.kernel for one in known] != [one.kernel for one in launches]:
            now = ", ".join(one.kernel for one in launches)
            was = "no such row" if known is None else ", ".join(one.kernel for one in known)
            said.append((key, now, f"by the table: {was}; run fused-ops audit --headline --write-table"))
            continue
        for old, new in zip(known, launches):
            said += [(key, new.kernel, text) for text in worse(old, new)]
    return said


def unknown_rows(table: Iterable[Key]) -> list[Key]:
    """The rows of a table that are headline rows no more."""
    known = {row.key for row in headline_rows()}
    return [key for key in table if key not in known]
