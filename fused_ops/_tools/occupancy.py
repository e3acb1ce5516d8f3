"""The committed table of how many programs an SM holds: for each audited configuration, by Triton version.

occupancy.csv has one row a configuration and one column a minor version of Triton. `fused-ops audit --write-table` writes the
column of the Triton that compiled; where a column has nothing for an architecture, nothing is expected there.
"""

from __future__ import annotations

import csv
import functools
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("occupancy.csv")
VERSIONS = ("3.6", "3.7", "3.8", "3.9")  # the supported ones


class Key(NamedTuple):
    """A configuration: all that a row of the table is looked up by."""

    kernel: str
    config: str
    dtype: str
    arch: int


Table = dict[str, dict[Key, int]]  # by Triton's minor version


def minor(version: str) -> str:
    """ "3.7" of "3.7.1"."""
    return ".".join(version.split(".")[:2])


def load(path: Path = TABLE) -> Table:
    """The table in a file; empty columns where there is none."""
    table: Table = {version: {} for version in VERSIONS}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = Key(row["kernel"], row["config"], row["dtype"], int(row["arch"]))
                for version in VERSIONS:
                    if row[version]:
                        table[version][key] = int(row[version])
    return table


@functools.cache
def committed() -> Table:
    """The table beside this file."""
    return load()


def save(table: Table, path: Path = TABLE) -> None:
    """Write a table, sorted; the file appears whole or not at all."""
    keys = sorted({key for column in table.values() for key in column})
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, *VERSIONS])
        writer.writerows([*key, *(table[version].get(key, "") for version in VERSIONS)] for key in keys)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def updated(table: Table, version: str, asked: Iterable[Key], found: dict[Key, int]) -> Table:
    """The table with what version compiled. asked: every configuration of the (kernel, arch) pairs that were compiled, so that
    others of these pairs, which no launch asks for any more, are dropped from the column.

    Raises ValueError on a version that the table has no column for.
    """
    if version not in VERSIONS:
        raise ValueError(f"Triton {version}: the table has columns for {', '.join(VERSIONS)}")
    pairs = {(key.kernel, key.arch) for key in asked}
    kept = {key: programs for key, programs in table[version].items() if (key.kernel, key.arch) not in pairs}
    return {**table, version: kept | found}


def findings(key: Key, triton: str, programs: int, table: Table) -> list[str]:
    """What is wrong with a kernel of which an SM holds so many programs, by the table."""
    column = table.get(minor(triton), {})
    if key in column:
        fewer = programs < column[key]
        return [f"an SM holds {programs} program{'s' * (programs != 1)}, {column[key]} by the table"] if fewer else []
    if any(known.arch == key.arch for known in column):
        return ["not in the table of programs an SM holds: run fused-ops audit --write-table"]
    return []


def falls(table: Table) -> list[tuple[Key, str, int, str, int]]:
    """(configuration, Triton, programs, next Triton, programs) wherever the next supported version holds fewer."""
    return [
        (key, before, table[before][key], after, table[after][key])
        for before, after in itertools.pairwise(VERSIONS)
        for key in sorted(table[before].keys() & table[after].keys())
        if table[after][key] < table[before][key]
    ]
