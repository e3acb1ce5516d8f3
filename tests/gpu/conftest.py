"""These tests exist only where there is a CUDA device; elsewhere they are not collected, and the summary says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
if any(importlib.util.find_spec(module) is None for module in ("onnx", "onnxruntime", "tensorrt_rtx")):
    collect_ignore_glob.append("test_engine.py")  # its helpers import onnx; the kernels' tests need only torch and triton


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "memory(bytes): the most device memory that the test holds (bench.correctness)")
    config.addinivalue_line("markers", "seconds(n): the test may take so many, whatever the others may (bench.correctness)")


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Several test processes share the GPU: none may keep what its largest test needed."""
    yield
    torch.cuda.empty_cache()
