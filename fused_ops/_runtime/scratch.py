"""Global scratch for kernels that make TMA descriptors: Triton asks for it at every launch, through a settable allocator.

Each launch gets memory of its own from PyTorch's caching allocator, and nothing is kept beyond the launch. A buffer that
stayed would be wrong inside a CUDA graph, and could not be told apart from one: `torch.compile(mode="reduce-overhead")` runs
its warm-up outside a capture, but in the graph's private pool, and raises where memory of that pool lives on unseen. Memory
given back after a launch is safe: the allocator hands it to later work of the same stream only, which runs after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scratch(size: int, device: int) -> Tensor:
    """Uninitialised memory of size bytes on a device, for one launch on its current stream.

    It begins at a multiple of 512 bytes, as all memory of the caching allocator, which is more than any kernel asks for.
    """
    return torch.empty((size,), dtype=torch.int8, device=device)


def allocator(size: int, alignment: int, stream: int | None) -> Tensor:
    """scratch on the current device, as Triton calls it. stream: the current one, where Triton launches."""
    return scratch(size, torch.cuda.current_device())


def ensure_allocator() -> None:
    """Make `allocator` Triton's where none is set.

    Triton keeps it in a context variable, so each of autograd's threads starts without one.
    """
    allocation = _allocation()
    if isinstance(allocation._allocator.get(), allocation.NullAllocator):
        allocation.set_allocator(allocator)


_module: Any = None


def _allocation() -> Any:
    global _module
    if _module is None:
        from triton.runtime import _allocation as module

        _module = module
    return _module
