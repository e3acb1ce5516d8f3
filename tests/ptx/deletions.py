"""What the PTX machine says of every main kernel without one of its synchronisation instructions.

    python -m tests.ptx.deletions [--kernel NAME] [--json]

Each instruction is deleted alone. It is "noticed" where the machine refuses what is left, or the result breaks the contract.
The others are deleted together, as many as can go without a word: those are "idle", they order nothing that is not ordered
without them. What is needed once the idle ones are gone is "covered": each of two barriers in a row covers the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fused_ops.testing import ContractMode
from fused_ops.testing.ptx.deletions import Synchronisation, synchronisations, without
from fused_ops.testing.ptx.gpu import Device, altered
from tests.ptx.main_kernels import Case, cases

NOTICED, COVERED, IDLE = "noticed", "covered", "idle"
LONGEST = 200  # characters of a message


@dataclass(frozen=True)
class Verdict:
    """What became of one deletion. message: of what noticed it; for a covered one, once the idle ones are gone too."""

    kind: str
    line: int
    text: str
    state: str
    message: str = ""


class Launch:
    """One launch of a case, which can be run again on the same memory with other PTX."""

    def __init__(self, case: Case, kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.case, self.kernel, self.grid, self.args, self.kwargs = case, kernel, grid, args, kwargs
        self.name: str = kernel.__name__
        self._before = self._memory()
        self.ptx = self._run()
        self._after = self._memory()
        self.instructions = synchronisations(self.ptx)

    def _memory(self) -> list[Tensor]:
        return [storage.clone() for storage in self._storages()]

    def _storages(self) -> list[Tensor]:
        found = (a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor))
        by_address = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in found}
        return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in by_address.values()]

    def _run(self) -> str:
        gpu = Device(self.case.arch)
        gpu.run(self.kernel, self.grid, self.args, self.kwargs)
        return str(gpu.launches[0].compiled.asm["ptx"])

    def alarm(self, deleted: Iterable[Synchronisation]) -> str:
        """What the machine, or the contract, says of the launch without these instructions; "" for nothing.

        An instruction that the machine does not know (UnsupportedError) is no alarm: it is raised.
        """
        left = without(self.ptx, *deleted)
        for storage, content in zip(self._storages(), self._before):
            storage.copy_(content)
        try:
            with altered(lambda ptx: left if ptx == self.ptx else ptx):
                self._run()
                if not all(map(torch.equal, self._storages(), self._after)):
                    with self.case.ready() as (_, call), ContractMode():
                        call()
        except AssertionError as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return said if len(said) <= LONGEST else f"{said[:60]} ... {said[60 - LONGEST :]}"
        return ""

    def verdicts(self) -> list[Verdict]:
        """What becomes of each instruction's deletion."""
        alone = {one: self.alarm([one]) for one in self.instructions}
        idle: list[Synchronisation] = []
        covered = {}
        for one, message in alone.items():
            if not message:
                needed = self.alarm([*idle, one])
                if needed:
                    covered[one] = needed
                else:
                    idle.append(one)
        states = {one: (NOTICED, message) if message else (COVERED, covered[one]) if one in covered else (IDLE, "")
                  for one, message in alone.items()}  # fmt: skip
        return [Verdict(one.kind, one.line, one.text, *states[one]) for one in self.instructions]


def launches(case: Case) -> list[Launch]:
    """The launches of a case's own kernels, one of each kernel and sequence of kinds; the result is held to the contract."""
    found: dict[Any, Launch] = {}

    def watch(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if case.owns(kernel.__name__):
            launch = Launch(case, kernel, grid, args, kwargs)
            found.setdefault((launch.name, *(one.kind for one in launch.instructions)), launch)
            return True
        return Device(case.arch).run(kernel, grid, args, kwargs)

    with case.ready(watch) as (_, call), ContractMode() as mode:
        checked = len(mode.checked)
        found.clear()
        call()
        assert len(mode.checked) > checked
    return list(found.values())


def main_launches(part: str = "") -> Iterator[Launch]:
    """The main kernels' launches that synchronise: of an architecture one for each kernel, number of warps and sequence of kinds.

    part: of the name of a case or kernel.
    """
    seen = set()
    for case in cases().values():
        wanted = case.compiles and (part in case.name or any(part in name for name in case.kernels()))
        for launch in launches(case) if wanted else ():
            if part not in case.name and part not in launch.name:
                continue
            key = case.arch, launch.name, launch.kwargs.get("num_warps"), *(one.kind for one in launch.instructions)
            if launch.instructions and key not in seen:
                seen.add(key)
                yield launch


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A line for each kernel and kind, then for each kernel, each kind and all."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        case = f"{row['case']} {row['kernel']}"
        for key in ((case, row["kind"]), (case, "all"), ("all", row["kind"]), ("all", "all")):
            states = counts.setdefault(key, dict.fromkeys((NOTICED, COVERED, IDLE), 0))
            states[row["state"]] += 1
    yield f"{'case and kernel':62} {'kind':28} {'deleted':>8} {NOTICED:>8} {COVERED:>8} {IDLE:>8}"
    for (case, kind), states in sorted(
        counts.items(), key=lambda item: [part for name in item[0] for part in (name == "all", name)]
    ):
        yield f"{case:62} {kind:28} {sum(states.values()):8} " + " ".join(f"{n:8}" for n in states.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.deletions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", help="only cases and kernels whose name holds this", default="")
    parser.add_argument("--json", action="store_true", help="a JSON object an instruction instead of a table")
    options = parser.parse_args(arguments)
    print(json.dumps({"triton": triton.__version__}) if options.json else f"Triton {triton.__version__}", flush=True)
    rows = []
    for launch in main_launches(options.kernel):
        print(f"{launch.case.name} {launch.name}: {len(launch.instructions)}", file=sys.stderr, flush=True)
        for verdict in launch.verdicts():
            row = {"case": launch.case.name, "kernel": launch.name, **asdict(verdict)}
            rows.append(row)
            if options.json:
                print(json.dumps(row), flush=True)
            elif verdict.state != NOTICED:
                print(f"{verdict.state:8} line {verdict.line:5} {verdict.text[:70]:70} {verdict.message}", flush=True)
    if not options.json:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
