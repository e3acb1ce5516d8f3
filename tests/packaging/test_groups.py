"""Tests of one xdist_group run in one process, so that what they share is made once."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("grouping")
def test_xdist_is_told_the_group(request: pytest.FixtureRequest) -> None:
    """By the end of the test's name. With a pytest that xdist does not know, the marker does nothing and nothing is said."""
    grouped = bool(request.config.getoption("loadgroup", False))  # set in a process of `pytest -n 2 --dist loadgroup`
    assert request.node.nodeid.endswith("@grouping") == grouped
