"""Which clamps are activations: the one that is relu, and no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from tests.fuse.test_count import counted

CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "clamp(min=0)": (lambda x: x.clamp(min=0), True),
    "clamp_min(0)": (lambda x: x.clamp_min(0.0), True),
    "clamp(0, 6)": (lambda x: x.clamp(0.0, 6.0), False),
    "clamp(min=-1)": (lambda x: x.clamp(min=-1.0), False),
    "clamp(max=0)": (lambda x: x.clamp(max=0.0), False),
}


@pytest.mark.parametrize(("clamp", "is_relu"), CLAMPS.values(), ids=CLAMPS)
def test_clamps(clamp: Callable[[Tensor], Tensor], is_relu: bool) -> None:
    assert counted(lambda m, x: clamp(m.fc1(x))) == ({"linear": (0, 1)} if is_relu else {})
