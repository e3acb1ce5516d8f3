"""python -m tests.fuzz: draw calls, check them, and tell what was found. The status is 1 where anything was."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch

from fused_ops import REGISTRY
from fused_ops.testing import INTERPRET

from .calls import parameters
from .run import Outcome, cases


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", choices=sorted(REGISTRY), help="calls of this op alone")
    parser.add_argument("--only-case", type=int, metavar="K", help="case K alone, and its call")
    parser.add_argument("--from-case", type=int, default=0, metavar="K", help="the first case (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in REGISTRY:
        parameters(name)  # here, so that no child does it again
    first, count = (options.from_case, options.calls) if options.only_case is None else (options.only_case, 1)
    seen = []
    for outcome in cases(options.seed, range(first, first + count), options.op):
        seen.append(outcome)
        if len(seen) % 100 == 0:
            print(f"{len(seen)} of {count}", file=sys.stderr, flush=True)
    if options.only_case is not None:
        print(seen[0].call)
    _report(seen, options.seed, options.op)
    return int(any(outcome.state == "failed" for outcome in seen))


def _report(seen: list[Outcome], seed: int, op: str | None) -> None:
    states = Counter(outcome.state for outcome in seen)
    path = "interpreted kernels" if INTERPRET else "ATen"
    print(
        f"{path}, seed {seed}: {len(seen)} calls, {states['valid']} valid, {states['refused']} refused, {states['failed']} failed"
    )
    failed = [outcome for outcome in seen if outcome.state == "failed"]
    counts = Counter(outcome.kind for outcome in failed)
    for kind, count in counts.most_common():
        first = next(outcome for outcome in failed if outcome.kind == kind)
        simplest = next(cases(seed, [first.case], op, simplest=True))
        print(f"\n{count} x {kind}\n    case {first.case}, made simple: {simplest.call}\n    {simplest.text}")


if __name__ == "__main__":
    sys.exit(main())
