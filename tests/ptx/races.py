"""python -m tests.ptx.races: does any schedule of a kernel's threads race? SentryWard's answer for the main kernels.

Every kernel of main_kernels.py is compiled, and run by the PTX machine, which sees one schedule with one set of values. SentryWard
proves each launch free of races and deadlocks in every schedule, or names two accesses that nothing orders. Exits with 1 where it
flags a kernel, and where it cannot read one whose instructions it should know. `make races` installs SentryWard and runs this.

A proof is for a launch's sizes alone, and for two of its programs (--programs): the PTX machine looks for races of all. SentryWard
knows no fences, no values and no wgmma; each pointer is an array of its own. Where several threads store one element, which is no
race because the PTX machine saw them store the same, one of them is left to store.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from fused_ops.testing.ptx.deletions import synchronisations, without

from .main_kernels import cases
from .race_input import SCHEMA, Run, as_input, beyond, runs_of

RACE_FREE, FLAGGED, UNSUPPORTED, NOT_RUN = "race_free", "flagged", "unsupported", "not run"
FLAGS = ("potential_race", "not_wellsynced", "invalid_lifecycle")
SECONDS, PROGRAMS = 600, 2
LONGEST = 160  # characters of a reason
MISSING = "python -m tests.ptx.races: SentryWard is not installed here: `make races` installs it and runs this"
BARRIER = "bar.sync 0;"
EXCHANGE = f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry exchange(.param .u64 .ptr .global .align 1 exchange_param_0)
.reqntid 64
{{
	.reg .b32 %r<6>; .reg .b64 %rd<4>;
	ld.param.b64 %rd1, [exchange_param_0];
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 2;
	mov.b32 %r3, global_smem;
	add.s32 %r4, %r3, %r2;
	st.shared.b32 [ %r4 + 0 ], %r1;
	{BARRIER}
	xor.b32 %r2, %r2, 128;
	add.s32 %r4, %r3, %r2;
	ld.shared.b32 %r5, [ %r4 + 0 ];
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [ %rd3 + 0 ], %r5;
	ret;
}}
"""
"""Each of two warps reads what the other has written: what SentryWard must pass, and flag without its barrier."""


@dataclass(frozen=True)
class Verdict:
    """What SentryWard says of one launch, or with deleted, of it without that instruction.

    verdict: race_free, flagged, unsupported, not run (by the PTX machine), or SentryWard's word for another end (timeout).
    why: its finding, or why it could not say.
    expected: whether the kernel's instructions tell that it cannot be read.
    """

    case: str
    kernel: str
    verdict: str
    seconds: float
    why: str = ""
    expected: bool = False
    kind: str = ""
    line: int = 0

    @property
    def bad(self) -> bool:
        return not self.kind and self.verdict != RACE_FREE and not (self.verdict == UNSUPPORTED and self.expected)


class Verifier:
    """SentryWard, with a limit of seconds for each proof."""

    def __init__(self, verify: Any, timeout: float) -> None:
        self._verify, self._timeout = verify, timeout

    def __call__(self, ptx: str, described: dict[str, Any]) -> tuple[str, float, str]:
        """(verdict, seconds, why) for a module's text and its launch."""
        ptx = re.sub(r"(?m)^[ \t]*\.(?:loc|file)\b.*$", "", ptx)  # so that places are named by their lines in the PTX
        with tempfile.TemporaryDirectory() as folder:
            module, launch = Path(folder, "kernel.ptx"), Path(folder, "input.json")
            module.write_text(ptx)
            launch.write_text(json.dumps(described))
            found = self._verify(module, input=launch, timeout_seconds=self._timeout)
        result = found["result"]
        why = "; ".join(map(_finding, found["diagnostics"][:1]))
        for race in found.get("races", [])[:1]:
            accesses = [
                f"thread {one['actor']} {one['mode']}s at line {one['location']['line']}"
                for one in (race["first"], race["second"])
            ]
            why = f"{' and '.join(accesses)}: {race['region']['address_space']} memory, nothing orders them"
        return FLAGGED if result in FLAGS else result, found.get("elapsed_seconds", 0.0), why

    def checked(self) -> bool:
        """Whether it passes a small program, and flags it without the barrier that the program needs."""
        launch = {"grid_dim": [1, 1, 1], "block_dim": [64, 1, 1], "cluster_dim": [1, 1, 1], "dynamic_shared_bytes": 256}
        described = {"schema": SCHEMA, "launch": launch, "arguments": []}
        programs = (EXCHANGE, EXCHANGE.replace(BARRIER, ""))
        return [self(ptx, described)[0] for ptx in programs] == [RACE_FREE, FLAGGED]


def _finding(diagnostic: dict[str, Any]) -> str:
    message = textwrap.shorten(diagnostic.get("message", ""), LONGEST, placeholder=" ...")
    return diagnostic["code"] + (f": {message}" if message else "")


def runs(pattern: str) -> tuple[list[Run], list[Verdict]]:
    """The launches of the kernels whose name the pattern is found in, one of each structure; and what the PTX machine could not run.

    Of one structure, a launch of several programs goes before one of a single program, which shows no race of two, and one of
    fewer threads before one of more.
    """
    found: dict[Any, Run] = {}
    failed = []
    for case in cases().values():
        kernels = [kernel for kernel in sorted(case.kernels()) if re.search(pattern, kernel)] if case.compiles else []
        try:
            made = runs_of(case) if kernels else []
        except Exception as error:  # of the compiler, of the machine: the other kernels are still to be looked at
            why = textwrap.shorten(f"{type(error).__name__}: {error}", LONGEST, placeholder=" ...")
            failed.append(Verdict(case.name, ", ".join(kernels), NOT_RUN, 0.0, why))
            continue
        for run in made:
            other = found.get(run.structure)
            if re.search(pattern, run.kernel) and (other is None or _size(run) < _size(other)):
                found[run.structure] = run
    return list(found.values()), failed


def _size(run: Run) -> tuple[bool, int]:
    return run.programs == 1, run.programs * run.program.threads


def verdicts(selected: list[Run], verifier: Verifier, programs: int, deletions: bool) -> Iterator[Verdict]:
    """The verdict of each launch, of so many clusters at most. deletions: of each that is race_free also without each of its
    synchronisation instructions.

    Those order the threads of a program or a cluster, so without one of them the first is looked at alone, which takes less.
    """
    for run in selected:
        described = as_input(run, min(run.programs, programs * run.ctas))
        ptx, reason = run.verified, beyond(run.program)
        verdict, seconds, why = verifier(ptx, described)
        why = f"{reason} ({why})" if verdict == UNSUPPORTED and reason else why
        yield Verdict(run.case, run.kernel, verdict, seconds, why, bool(reason))
        if deletions and verdict == RACE_FREE:
            described = as_input(run, run.ctas)
            for one in synchronisations(ptx):
                verdict, seconds, why = verifier(without(ptx, one), described)
                yield Verdict(run.case, run.kernel, verdict, seconds, why, kind=one.kind, line=one.line)


def _print(verdict: Verdict) -> None:
    place = f"without {verdict.kind} at line {verdict.line}" if verdict.kind else f"{verdict.kernel} ({verdict.case})"
    note = " EXPECTED" if verdict.verdict == UNSUPPORTED and verdict.expected else ""
    print(
        f"{'    ' if verdict.kind else ''}{place:70} {verdict.verdict:11} {verdict.seconds:6.1f} s{note} {verdict.why}",
        flush=True,
    )


def summary(found: list[Verdict]) -> str:
    """How many launches, and how many deletions, came to each verdict."""
    lines = [f"Triton {triton.__version__}"]
    for what, some in (("launches", [v for v in found if not v.kind]), ("deletions", [v for v in found if v.kind])):
        counts = {verdict: sum(v.verdict == verdict for v in some) for verdict in dict.fromkeys(v.verdict for v in some)}
        if some:
            lines.append(f"{len(some)} {what}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.races", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernel", default="", metavar="PATTERN", help="kernels with this in their names, a regular expression"
    )
    parser.add_argument(
        "--deletions", action="store_true", help="each also without each synchronisation instruction: is it needed?"
    )
    parser.add_argument("--timeout", type=float, default=SECONDS, help="seconds a proof (default: %(default)s)")
    parser.add_argument(
        "--programs",
        type=int,
        default=PROGRAMS,
        help="of a launch at most, or clusters: each takes its time (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a verdict")
    options = parser.parse_args(arguments)
    try:
        verify = importlib.import_module("sentryward").verify
    except ImportError:
        print(MISSING, file=sys.stderr)
        return 2
    verifier = Verifier(verify, options.timeout)
    if not verifier.checked():
        print("SentryWard does not flag a program without the barrier that it needs: its verdicts say nothing", file=sys.stderr)
        return 1
    selected, failed = runs(options.kernel)
    if not selected and not failed:
        parser.error(f"--kernel: no main kernel has {options.kernel!r} in its name")
    found = []
    for verdict in itertools.chain(failed, verdicts(selected, verifier, options.programs, options.deletions)):
        found.append(verdict)
        if options.json:
            print(json.dumps(asdict(verdict)), flush=True)
        else:
            _print(verdict)
    print(summary(found), file=sys.stderr if options.json else sys.stdout)
    return int(any(verdict.bad for verdict in found))


if __name__ == "__main__":
    sys.exit(main())
