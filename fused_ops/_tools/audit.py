"""The audit: every kernel that an op launches compiled ahead of time for an architecture, with no GPU.

audit_cases.py lists the cases, which needs torch; kernels/aot.py compiles them in a process of its own, which needs only
Triton. So one installation audits every Triton version there is an interpreter for. occupancy.py holds how many programs of each
an SM is to hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._runtime.settings import compiling_environment
from . import occupancy
from .audit_cases import ARCHITECTURES, KNOWN_ARCHITECTURES, audit_cases
from .forecast.launched import Columns
from .occupancy import Key, Table

__all__ = ["ARCHITECTURES", "KNOWN_ARCHITECTURES", "AuditRow", "audit_cases", "parse_architectures", "run_audit", "write_table"]
JSON_KEYS = (
    "kernel", "config", "arch", "dtype", "registers", "spill_bytes", "shared_bytes", "load_bits", "store_bits", "mma", "triton",
)  # fmt: skip
COUNTED_KEYS = ("row", *Columns._fields)
"""What --headline adds: the row, as "softmax 4k bfloat16 fwd", and the columns of `forecast.launched`. null in other rows."""
VECTOR_BITS = 128


@dataclass(frozen=True)
class AuditRow:
    """What one kernel costs on one architecture.

    registers, spill_bytes: a thread's. shared_bytes: a program's. load_bits, store_bits: the access widths that move the
    most bytes; loads, stores: the bits moved by each width. occupancy: programs that an SM holds. num_ctas: the programs of
    a cluster; cluster_accesses: reads of another program's shared memory. error: the compiler's, where there is no kernel.
    skipped: why a case is not for the Triton that compiles. counted: see kernels/sass/counted.py; empty where no launch is known.
    """

    kernel: str
    config: str
    arch: int
    dtype: str
    triton: str
    num_warps: int
    aligned: bool
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    load_bits: int = 0
    store_bits: int = 0
    mma: str = ""
    occupancy: int = 0
    shared_limit: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    num_ctas: int = 1
    cluster_accesses: int = 0
    error: str = ""
    skipped: str = ""
    counted: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What the table of programs an SM holds knows the kernel by."""
        return Key(self.kernel, self.config, self.dtype, self.arch)

    def findings(self, table: Table | None = None) -> list[str]:
        """What is wrong with the kernel; empty where nothing is, and where it was skipped. table: None: the committed one."""
        if self.skipped:
            return []
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > self.shared_limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, the limit is {self.shared_limit}")
        if self.aligned and self.load_bits < VECTOR_BITS:
            found.append(f"loads {self.load_bits} bits at a time from aligned rows")
        if self.num_ctas > 1 and not self.cluster_accesses:
            found.append("shares nothing over its cluster")
        return found + occupancy.findings(self.key, self.triton, self.occupancy, table or occupancy.committed())

    def as_json(self) -> dict[str, Any]:
        """The published fields, JSON-serialisable."""
        row = asdict(self)
        return {key: row[key] for key in JSON_KEYS} | dict.fromkeys(COUNTED_KEYS)


def parse_architectures(text: str) -> list[int]:
    """[80, 90] from "80,90". Raises ValueError on anything that is no compute capability the kernels support."""
    items = [item.strip() for item in text.split(",")]
    if not all(item.isdigit() and int(item) in KNOWN_ARCHITECTURES for item in items):
        raise ValueError(f"got {text!r}, allowed: some of {', '.join(map(str, KNOWN_ARCHITECTURES))}, separated by commas")
    return list(dict.fromkeys(map(int, items)))


def run_audit(
    cases: list[dict[str, Any]], jobs: int | None = None, python: str | None = None, done: Callable[[], None] = lambda: None
) -> list[AuditRow]:
    """Compile cases, and return their rows in order.

    jobs: processes to compile in; None: one a core, up to 4. python: an interpreter that has Triton; None: this one. done:
    called after each case.
    """
    worker = Path(__file__).parents[1] / "kernels" / "aot.py"
    command = [python or sys.executable, str(worker.resolve())]
    if jobs is not None:
        command += ["--jobs", str(jobs)]
    rows: dict[int, AuditRow] = {}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=compiling_environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        json.dump(cases, process.stdin)
        process.stdin.close()
        for line in process.stdout:
            row = json.loads(line)
            index = row.pop("index")
            rows[index] = AuditRow(**row)
            done()
    if process.returncode or len(rows) != len(cases):
        raise RuntimeError(
            f"audit: the compiling process ended with {process.returncode} after {len(rows)} of {len(cases)} cases"
        )
    return [rows[i] for i in range(len(cases))]


def write_table(rows: list[AuditRow]) -> None:
    """Put the programs that an SM holds of rows, which one Triton compiled, into the committed table.

    rows: all configurations of their (kernel, arch) pairs. Raises ValueError on a Triton without a column.
    """
    found = {row.key: row.occupancy for row in rows if not row.skipped and not row.error}
    column = occupancy.minor(rows[0].triton)
    occupancy.save(occupancy.updated(occupancy.load(), column, [row.key for row in rows], found))
    occupancy.committed.cache_clear()
