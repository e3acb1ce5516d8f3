"""Every synchronisation instruction of a kernel's PTX, and the PTX without one or several of them.

A machine that checks synchronisation is judged by what it says of kernels that lack some. What it does not notice must be
redundant. Nothing here is a list by kernel: `synchronisations` finds the instructions by their mnemonics.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = (
    "bar", "bar.sync", "bar.arrive", "bar.red", "bar.warp.sync", "barrier", "barrier.sync", "barrier.cluster.arrive",
    "barrier.cluster.wait", "cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all", "cp.async.mbarrier.arrive",
    "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "fence", "fence.acq_rel", "fence.sc", "fence.mbarrier_init",
    "fence.proxy", "fence.proxy.async", "fence.proxy.alias", "fence.proxy.tensormap", "griddepcontrol", "mbarrier",
    "mbarrier.init", "mbarrier.inval", "mbarrier.arrive", "mbarrier.arrive.expect_tx", "mbarrier.expect_tx",
    "mbarrier.complete_tx", "mbarrier.try_wait", "mbarrier.test_wait", "membar", "tcgen05.commit", "tcgen05.fence",
    "tcgen05.wait", "tensormap.cp_fenceproxy", "wgmma.commit_group", "wgmma.fence", "wgmma.wait_group",
)  # fmt: skip
"""What an instruction is listed under: the longest of these that its mnemonic begins with."""
WAITS = ("mbarrier.try_wait", "mbarrier.test_wait")  # without the wait, its predicate is true at once

_STATEMENT = re.compile(
    r"(?:^|(?<=[;{}]))\s*(?:[\w$]+:(?!:)\s*)*"  # where a statement may begin; labels
    r"(?P<whole>(?:@!?[\w%$]+\s+)?(?P<op>[a-z]\w*(?:(?:\.|::)\w+)*)(?=[\s;])[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;)",
    re.MULTILINE,
)
_NO_CODE = re.compile(r"//[^\n]*|^[ \t]*\.(?:loc|file|section|pragma)\b[^\n]*", re.MULTILINE)


@dataclass(frozen=True)
class Synchronisation:
    """One instruction. kind: one of KINDS. line: its number in the PTX, from 1. text: as it stands there, its guard included.

    start, end: where it stands. instead: what takes its place when it is deleted.
    """

    kind: str
    line: int
    text: str
    start: int
    end: int
    instead: str = ""


def synchronisations(ptx: str) -> list[Synchronisation]:
    """The synchronisation instructions of a module, in the order of its text."""
    found = []
    for start, end, op in _statements(ptx):
        kind = _kind(op)
        if kind is not None:
            text = " ".join(ptx[start:end].split())
            found.append(Synchronisation(kind, ptx.count("\n", 0, start) + 1, text, start, end, _instead(kind, text)))
    return found


def mnemonics(ptx: str) -> list[str]:
    """The mnemonics of all instructions of a module, in the order of its text."""
    return [op for _, _, op in _statements(ptx)]


def without(ptx: str, *deleted: Synchronisation) -> str:
    """ptx without the instructions, of those that `synchronisations` finds in it. Lines keep their numbers."""
    for one in sorted(deleted, key=lambda one: one.start, reverse=True):
        gone = ptx[one.start : one.end]
        if " ".join(gone.split()) != one.text:
            raise ValueError(f"line {one.line}: {one.text!r} is not there")
        ptx = ptx[: one.start] + one.instead + "\n" * gone.count("\n") + ptx[one.end :]
    return ptx


def _statements(ptx: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, mnemonic) of each instruction, its guard included."""
    code = _NO_CODE.sub(lambda gone: " " * len(gone[0]), ptx)  # in place
    for statement in _STATEMENT.finditer(code):
        yield statement.start("whole"), statement.end("whole"), statement["op"]


def _kind(op: str) -> str | None:
    """The kind of a mnemonic, or None for an instruction that synchronises nothing."""
    fitting = (kind for kind in KINDS if re.match(rf"{re.escape(kind)}(?:\.|::|$)", op))
    return max(fitting, key=len, default=None)


def _instead(kind: str, text: str) -> str:
    """What stands for a deleted instruction: nothing, or for a wait in memory that its predicate is true."""
    if kind not in WAITS:
        return ""
    wait = re.fullmatch(r"(@!?\S+ )?\S+ ([\w%$]+)\s*,.*;", text)
    if wait is None:
        raise ValueError(f"a wait without a predicate: {text!r}")
    return f"{wait[1] or ''}mov.pred {wait[2]}, -1;"
