"""python -m tests.mutate: which faults, put into the sources one at a time, no test notices.

Sixty-five faults that somebody wrote and sixty that fixed operators draw. Each is put into a copy of the sources and the tests that
should notice it run there. Prints one line a mutant and a summary, and writes one JSON object a mutant to --output. Not a part of the
continuous integration: it takes about an hour on two cores. Exits with 1 where fewer than 95% are noticed.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

from . import clock
from .drawn import SEED, draw
from .listed_host import MUTANTS as HOST
from .listed_kernels import MUTANTS as KERNELS
from .mutant import AREAS, ROOT, Mutant
from .runner import Outcome, run_all

LEAST_KILLED = 0.95


def summary(found: list[Outcome]) -> str:
    """How many were killed, by area, and every survivor."""
    verdicts = ("killed", "survived", "equivalent", "error")
    rows = [f"{'area':10}" + "".join(f"{verdict:>12}" for verdict in verdicts)]
    for area in (*AREAS, "all"):
        counts = [sum(o.verdict == v and area in (o.area, "all") for o in found) for v in verdicts]
        if any(counts):
            rows.append(f"{area:10}" + "".join(f"{count:>12}" for count in counts))
    for outcome in found:
        if outcome.verdict != "killed":
            rows.append(f"{outcome.verdict}: {outcome.id} {outcome.path}: {outcome.fault}")
            rows.append(f"    {outcome.by or outcome.tests}")
    return "\n".join(rows)


def main() -> int:
    """Run the mutants that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="copies of the sources that are worked on at once")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ID", help="a mutant's name, or a pattern of names; repeat"
    )
    parser.add_argument("--area", choices=AREAS, action="append", default=[], help="only this area's; repeat")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "mutants.jsonl", help="the table, one JSON object a mutant"
    )
    options = parser.parse_args()
    mutants: list[Mutant] = [*KERNELS, *HOST, *draw(options.seed)]
    if options.only:
        mutants = [m for m in mutants if any(fnmatch.fnmatch(m.id, pattern) for pattern in options.only)]
    if options.area:
        mutants = [m for m in mutants if m.area in options.area]
    if not mutants:
        parser.error(f"--only, --area: no mutant is {', '.join((*options.only, *options.area))}")
    if options.list:
        print("\n".join(f"{m.id} {m.area} {m.path}: {m.fault}" for m in mutants))
        return 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    start = clock.seconds()
    with options.output.open("w") as table:

        def done(outcome: Outcome) -> None:
            print(outcome.as_json(), file=table, flush=True)
            print(f"{outcome.verdict:10} {outcome.id} {outcome.seconds:6.1f} s {outcome.fault} | {outcome.by}", flush=True)

        found = run_all(mutants, options.jobs, done)
    print(summary(found))
    killed, counted = (sum(o.verdict in which for o in found) for which in (("killed",), ("killed", "survived", "error")))
    print(f"{killed} of {counted} killed in {clock.seconds() - start:.0f} s")
    return 0 if killed >= LEAST_KILLED * counted else 1


if __name__ == "__main__":
    sys.exit(main())
