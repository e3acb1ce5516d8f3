"""How much memory a computation holds at its peak, counted on any device: the storages that live tensors share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ops import REGISTRY


class PeakMemory(TorchDispatchMode):
    """While active, notes every storage that an operator returns and when it dies; `peak` is the most bytes alive at once.

    What existed before is not counted. Our raw operators are opened, so that what a launch allocates and frees inside is
    seen; what ATen's operators, and the interpreter, allocate inside is not. Triton's interpreter leaves its arguments in
    a reference cycle, which is collected before each count.
    """

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._before = {t.untyped_storage()._cdata for t in before}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._launches = {raw.overload: raw.launch for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._launches:
            with self:
                return self._launches[func](*args)
        result = func(*args, **(kwargs or {}))
        self._note(result)
        return result

    def _note(self, result: Any) -> None:
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._before:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if sum(size for _, size in self._alive.values()) > self.peak:
            gc.collect()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def _tensors(result: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def peak_of(step: Callable[[], Any], before: list[Tensor]) -> int:
    """The most bytes that step() holds at once beyond the tensors before."""
    gc.freeze()  # so that each collection looks at what step() made, not at all modules too
    try:
        with PeakMemory(before) as mode:
            step()
    finally:
        gc.unfreeze()
    return mode.peak
