"""NVTX ranges: set FUSED_OPS_NVTX=1 before the first import, and Nsight shows each operator's name over its kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .notices import LOGGER


def in_nvtx_range(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """run inside an NVTX range of that name. Where this torch was built without NVTX: run itself, and a warning once."""
    nvtx = torch.cuda.nvtx
    try:
        nvtx.range_push("fused_ops")
        nvtx.range_pop()
    except RuntimeError:
        _say_no_nvtx()
        return run

    @functools.wraps(run)
    def inside(*args: Any) -> Any:
        nvtx.range_push(name)
        try:
            return run(*args)
        finally:
            nvtx.range_pop()

    return inside


@functools.cache
def _say_no_nvtx() -> None:
    LOGGER.warning("fused_ops: FUSED_OPS_NVTX is set, but this PyTorch was built without NVTX: no ranges")
