"""The Triton kernels themselves, in Triton's interpreter: run with TRITON_INTERPRET=1 (one mode a process)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fused_ops._runtime import settings
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import forget_plans, watch_launches

os.environ.setdefault("TRITON_INTERPRET", "0")
if settings.INTERPRET:
    from tests import quick_interpreter

    quick_interpreter.install()
collect_ignore_glob = [] if settings.INTERPRET else ["*"]


@pytest.fixture(autouse=True)
def _no_watcher() -> Iterator[None]:
    """Whoever watches launches does so until the end of the test."""
    yield
    watch_launches(None)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str, RowConfig], list[str]]]:
    """force(module, chooser, config): the chooser answers config; returns the names of the kernels launched from then on.

    No cluster takes the place of a chunked config, as it would by default where Triton has clusters.
    """
    monkeypatch.setattr(settings, "CLUSTER", False)
    launched: list[str] = []
    ctas = {1}

    def spy(kernel: Any, _grid: int, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if "column_sum" not in kernel.__name__:
            launched.append(kernel.__name__)
            assert kwargs.get("num_ctas", 1) in ctas
        return False

    def force(module: Any, chooser: str, config: RowConfig) -> list[str]:
        forget_plans()
        ctas.clear()
        ctas.add(config.num_ctas)
        monkeypatch.setattr(module, chooser, lambda *_: config)
        watch_launches(spy)
        return launched

    yield force
    forget_plans()
