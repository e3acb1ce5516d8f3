"""A timing cache that TensorRT does not take is refused, and never passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fused_ops.export import ExportError
from fused_ops.export.tensorrt.config import attach_timing_cache


class Config:
    """TensorRT's, as far as a timing cache is attached to it."""

    def __init__(self, made: Any, taken: bool) -> None:
        self.made, self.taken = made, taken

    def create_timing_cache(self, data: bytes) -> Any:
        return self.made

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return self.taken


@pytest.mark.parametrize(("made", "taken"), [(None, True), ("cache", False), ("cache", True)])
def test_attached_or_refused(made: Any, taken: bool, tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    if made and taken:
        assert attach_timing_cache("build_engine", Config(made, taken), path) is made
    else:
        with pytest.raises(ExportError, match=r"timing_cache: got .*timing.cache"):
            attach_timing_cache("build_engine", Config(made, taken), path)
    assert attach_timing_cache("build_engine", Config(made, taken), None) is None
