"""The mutants fit the sources as they are: `python -m tests.mutate` itself runs elsewhere."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutate.drawn import LEFT_OUT, QUOTA, candidates, draw
from tests.mutate.equivalent import EQUIVALENT
from tests.mutate.listed_host import MUTANTS as HOST
from tests.mutate.listed_kernels import MUTANTS as KERNELS
from tests.mutate.mutant import AREAS, ROOT, Mutant, Replacement, Selection, aten
from tests.mutate.sites import sites

LISTED: tuple[Mutant, ...] = (*KERNELS, *HOST)


def test_every_listed_fault_has_its_one_place() -> None:
    assert len(LISTED) >= 64
    assert len({mutant.id for mutant in LISTED}) == len(LISTED)
    for mutant in LISTED:
        source = (ROOT / mutant.path).read_text()
        changed = mutant.mutated(source)
        assert changed != source, mutant.id
        ast.parse(changed)


def test_the_draw_is_of_its_sizes_and_the_same_again() -> None:
    drawn = draw()
    counts = Counter(mutant.area for mutant in drawn if not mutant.equivalent)
    assert counts == QUOTA
    assert sum(QUOTA.values()) == 60
    for mutant in drawn:
        ast.parse(mutant.mutated((ROOT / mutant.path).read_text()))
    names = [mutant.id for mutant in drawn]
    assert names == [mutant.id for mutant in draw()]
    assert names != [mutant.id for mutant in draw(seed=0)]


def test_what_is_called_equivalent_is_there() -> None:
    assert set(EQUIVALENT) <= {site.name for area in AREAS for _, site in candidates(area)}


def test_every_selection_names_tests_that_exist() -> None:
    selections: set[Selection] = {tests for mutant in (*LISTED, *draw()) for tests in mutant.runs}
    assert selections
    missing = [path for tests in selections for path in tests.paths.split() if not (ROOT / "tests" / path).exists()]
    assert missing == []
    assert [name for name in LEFT_OUT if not (ROOT / name).exists()] == []


def test_a_fault_without_its_one_place_is_an_error() -> None:
    mutant = Replacement("X", "kernels", "", "a.py", (aten("kernels"),), inside="f", old="x + 1", new="x")
    assert mutant.mutated("def f(x):\n    return x + 1\n\n\ny = x + 1\n") == "def f(x):\n    return x\n\n\ny = x + 1\n"
    for source in ("def f(x):\n    return x\n", "def f(x):\n    return x + 1 + (x + 1)\n", "y = x + 1\n"):
        with pytest.raises(LookupError, match=r"mutant X: .* allowed: once"):
            mutant.mutated(source)


SOURCE = '''
def f(stride_xm, stride_xn, mask):
    """What 1 < 2 says."""
    if stride_xm < 1:
        raise ValueError(f"got {stride_xm < 2}")
    y = tl.load(p + stride_xm, mask=mask & other, other=0.0, eviction_policy="first")
    y += 3
    return y
'''


def test_what_the_operators_change() -> None:
    for jitted in (False, True):
        found = sites(("@triton.jit" if jitted else "") + SOURCE, "a.py", kernels=False)
        changes = {(site.operator, site.old, site.new) for site in found}
        always = {
            ("comparison", "stride_xm < 1", "stride_xm <= 1"), ("constant", "1", "2"), ("constant", "0.0", "1.0"), ("constant", "3", "4"),
            ("stride", "stride_xm", "stride_xn"), ("statement", "y += 3", "pass"),
            ("statement", 'if stride_xm < 1:\n        raise ValueError(f"got {stride_xm < 2}")', "pass"),
        }  # fmt: skip
        masks = {("mask", "mask & other", "(mask)"), ("mask", "mask & other", "(other)")}
        masks |= {
            (operator, old, new) for operator, old, new in changes if new == "tl.load(p + stride_xm, eviction_policy='first')"
        }
        assert changes == (always | masks if jitted else always)


def test_a_change_elsewhere_keeps_a_sites_name() -> None:
    def names(source: str) -> set[str]:
        return {site.name for site in sites(source, "a.py", kernels=False)}

    assert names(SOURCE) < names("def g():\n    return 1\n" + SOURCE)
