"""Global scratch for kernels that make TMA descriptors: Triton asks for it at every launch, through a settable allocator.

An allocation a launch would cost 1-2 µs of host time and an allocator entry. Each (device, stream) keeps one buffer
instead: launches on a stream run in order, and every program writes its descriptors before it reads them. During CUDA
graph capture each launch gets memory of the graph's own, for a replay may run on another stream than the capture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST_BYTES = 1 << 18  # above what any launch here asks for: 640 bytes of descriptors for each of 148 programs

_buffers: dict[tuple[int, int], Tensor] = {}


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory of at least size bytes on the current device, for one launch on a stream; aligned to 512 bytes."""
    device = torch.cuda.current_device()
    if torch.cuda.is_current_stream_capturing():
        return torch.empty((size,), dtype=torch.int8, device=device)
    key = (device, stream or 0)
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty((max(size, LEAST_BYTES),), dtype=torch.int8, device=device)
        _buffers[key] = buffer
    return buffer


def ensure_allocator() -> None:
    """Make `scratch` Triton's allocator where none is set.

    Triton keeps it in a context variable, so each of autograd's threads starts without one.
    """
    allocation = _allocation()
    if isinstance(allocation._allocator.get(), allocation.NullAllocator):
        allocation.set_allocator(scratch)


_module: Any = None


def _allocation() -> Any:
    global _module
    if _module is None:
        from triton.runtime import _allocation as module

        _module = module
    return _module
