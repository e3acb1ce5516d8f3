"""nn.Sequential whose forward computes a Linear and the activation after it as one: neighbours as they are at each call."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from .chains import chain
from .edit import Made


class FusedSequential(nn.Sequential):
    """nn.Sequential that fuses neighbours: the mixin of a class that fuse makes. Slices are of the class before."""

    _fuse_made: Made
    _fuse_ops: frozenset[str] = frozenset()
    _fuse_left: tuple[nn.Module, ...] = ()  # the Linears that fuse's filter_fn refused

    def forward(self, input: Any) -> Any:
        return chain(self, input, self._fuse_ops, self._fuse_left)

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            base: Any = self._fuse_made.base
            return base(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)
