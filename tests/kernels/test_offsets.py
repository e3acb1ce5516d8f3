"""Every offset that multiplies a stride or a size is computed in 64 bits, in every kernel, whatever it calls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.widths import Functions, calls, functions, narrow_products

ROOT = Path(__file__).parents[2] / "kernels"
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
KNOWN = functions(SOURCES.values())
KERNELS = [name for name in KNOWN if name.endswith("_kernel")]
CALLED = {kernel: calls(KNOWN, kernel) for kernel in KERNELS}
WIDENING = re.compile(r"\.to\([tg]l\.int64\)")
UNNEEDED = {"_store_dact: cols = col.to(tl.int64) + tl.arange(0, BLOCK_N)"}  # it is only added to what is wide


@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_are_64_bits_wide(kernel: str) -> None:
    assert narrow_products(KNOWN, kernel) == []


def _without_one() -> Iterator[tuple[str, str, Functions]]:
    """(a function, the line, the functions as they are where that line widens no more) of each widening."""
    for text in SOURCES.values():
        for match in WIDENING.finditer(text):
            changed = functions([text[: match.start()] + text[match.end() :]])
            line = text[: match.start()].count("\n") + 1
            inside = next(name for name, node in changed.items() if node.lineno <= line <= (node.end_lineno or 0))
            yield inside, text.splitlines()[line - 1].strip(), {**KNOWN, **changed}


def test_every_widening_is_needed() -> None:
    """Without any one of them a product is found that 32 bits may not hold."""
    unnoticed, tried = set(), 0
    for inside, line, known in _without_one():
        tried += 1
        if not any(narrow_products(known, kernel) for kernel in KERNELS if inside in CALLED[kernel]):
            unnoticed.add(f"{inside}: {line}")
    assert unnoticed <= UNNEEDED
    assert tried > 40
    assert len(KERNELS) > 20
