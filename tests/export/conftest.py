"""Fixtures that the export tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's ONNX file goes, in a folder of its own."""
    return tmp_path / "model.onnx"
