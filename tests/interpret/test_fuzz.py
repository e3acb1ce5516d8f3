"""Calls drawn at random (tests/fuzz) with the kernels interpreted: a fixed few here, the whole behind `slow`."""

from __future__ import annotations

import pytest

from tests.fuzz.run import cases, outcome, told

SEED, FEW, MANY = 16, 25, 500


@pytest.mark.parametrize("case", range(FEW))
def test_a_few_calls(case: int) -> None:
    assert not told([outcome(SEED, case)])


@pytest.mark.slow
def test_many_calls() -> None:
    seen = list(cases(SEED, range(MANY)))
    assert len(seen) == MANY
    assert not told(seen)
