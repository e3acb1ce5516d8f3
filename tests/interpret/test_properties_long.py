"""The drawn cases of test_properties.py, three times as many."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.interpret import test_properties

MANY = settings(max_examples=90, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@pytest.mark.parametrize("op", ["softmax", "layer_norm", "linear"])
def test_many(op: str) -> None:
    drawn = getattr(test_properties, f"test_{op}").hypothesis.inner_test
    MANY(given(st.data())(drawn))()
