"""These tests exist only where there is a CUDA device; elsewhere they are not collected, and the summary says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Several test processes share the GPU: none may keep what its largest test needed."""
    yield
    torch.cuda.empty_cache()
