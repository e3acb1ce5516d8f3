"""fuse in one thread beside forwards in another: of another model, and of the very model that is being fused."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fused_ops import fuse, unfuse
from tests.fuse.doors import assert_fuses_linears, built, everything, x4

pytestmark = pytest.mark.filterwarnings("ignore")
FORWARDS = 10_000


class Forwards(threading.Thread):
    """Runs forwards of a model until it has done `count` of them and, if asked, until it is stopped; keeps what went wrong."""

    def __init__(self, model: nn.Module, x: torch.Tensor, count: int) -> None:
        super().__init__()
        self.model, self.x, self.count, self.done = model, x, count, 0
        self.failed: list[BaseException] = []
        self.stopped = threading.Event()
        with torch.no_grad():
            self.expected = model(x)

    def run(self) -> None:
        with torch.no_grad():
            while self.done < self.count or not self.stopped.is_set():
                try:
                    if not torch.allclose(self.model(self.x), self.expected):
                        raise ArithmeticError("a wrong number")
                except Exception as error:
                    self.failed.append(error)
                self.done += 1


@pytest.fixture
def _often() -> Iterator[None]:
    """Threads take turns every ten microseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_often")
def test_fusing_beside_another_models_forwards():
    """At least 10,000 forwards of another model while this thread fuses and unfuses: each right."""
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double().eval()
    thread = Forwards(other, x4(), FORWARDS)
    models = [built(name)[0] for name in ("bert", "gpt2", "llama")] + [everything()]
    rounds = 0
    thread.start()
    try:
        while thread.done < FORWARDS:
            for model in models:
                assert_fuses_linears(fuse(model))
                unfuse(model)
            rounds += 1
    finally:
        thread.stopped.set()
        thread.join()
    assert rounds >= 1
    assert thread.done >= FORWARDS
    assert not thread.failed, (len(thread.failed), thread.failed[0])


@pytest.mark.usefixtures("_often")
def test_fusing_a_model_beside_its_own_forwards():
    model = everything().eval()
    thread = Forwards(model, x4(), 300)
    thread.start()
    try:
        while thread.done < 300:
            assert_fuses_linears(fuse(model))
            unfuse(model)
    finally:
        thread.stopped.set()
        thread.join()
    assert not thread.failed, (len(thread.failed), thread.failed[0])
