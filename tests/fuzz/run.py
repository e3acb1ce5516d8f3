"""Cases in forked processes, so that a call which ends its process is a finding like any other."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .calls import Call
from .check import NUMERIC, Failure, check
from .draw import draw
from .shrink import shrink

BATCH, SECONDS = 50, 600


class Outcome(NamedTuple):
    """What became of a case. state: "valid", "refused" or "failed". kind: of a failure: alike ones have the same."""

    case: int
    state: str
    kind: str = ""
    text: str = ""
    call: str = ""


def outcome(seed: int, case: int, op: str | None = None, simplest: bool = False) -> Outcome:
    """Draw a case and check it. simplest: a call that fails is made simpler, and the simplest is what is told."""
    call = draw(seed, case, op)
    state, failure = _checked(call)
    if failure is None:
        return Outcome(case, state, call=str(call))
    kind = kind_of(call, failure)
    if simplest:
        call = shrink(call, lambda other: (seen := _checked(other)[1]) is not None and kind_of(other, seen) == kind)
        failure = _checked(call)[1] or failure
    return Outcome(case, "failed", kind, failure.text, str(call))


def _checked(call: Call) -> tuple[str, Failure | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(call), None
    except Failure as failure:
        return "failed", failure
    except Exception as error:  # of the check itself
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", Failure("the check broke", f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"[:400])


def kind_of(call: Call, failure: Failure) -> str:
    """What a failure is called: its check, its op and what it says without its numbers."""
    said = re.split(r": got|: \d+ of|, at \(", failure.text)[0]
    said = re.sub(r"\(.*?\)|\[.*?\]|-?\d+(\.\d+)?(e[+-]?\d+)?|'.*?'|nan|inf\b", "#", said)[:90]
    wrong = f" ({' '.join(call.fault)})" if call.fault else ""
    dtype = next(form.dtype for form in call.tensors.values() if form is not None)
    numbers = f" in {str(dtype).removeprefix('torch.')}" if failure.check in NUMERIC else ""
    numbers += ", misplaced" * ("by inf" in failure.text)
    return f"{failure.check} | {call.op}{wrong}{numbers} | {said}"


def told(outcomes: Iterable[Outcome]) -> list[str]:
    """What a test says of those that failed."""
    return [f"case {o.case}: {o.kind}: {o.text}: {o.call}" for o in outcomes if o.state == "failed"]


def cases(seed: int, numbers: Iterable[int], op: str | None = None, simplest: bool = False) -> Iterator[Outcome]:
    """The outcome of each case. One that ends its process, or hangs, is failed."""
    left = list(numbers)
    while left:
        seen = 0
        for line in _forked(seed, left[:BATCH], op, simplest):
            if isinstance(line, int):  # the child's status
                break
            seen += 1
            yield Outcome(*line)
        if seen < min(BATCH, len(left)):
            call = draw(seed, left[seen], op)
            yield Outcome(left[seen], "failed", f"ends its process | {call.op} | {line}", f"status {line}", str(call))
            seen += 1
        left = left[seen:]


def _forked(seed: int, numbers: list[int], op: str | None, simplest: bool) -> Iterator[Any]:
    """Each outcome as a list, then the child's exit status."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as stream:
                for case in numbers:
                    signal.alarm(SECONDS)
                    print(json.dumps(outcome(seed, case, op, simplest)), file=stream, flush=True)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        for line in stream:
            yield json.loads(line)
    yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
