"""Raw operators outside the caller's autocast regions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_any_autocast = torch._C._is_any_autocast_enabled
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)  # the keys of every device's autocast
for _name, _key in torch._C.DispatchKey.__members__.items():
    if _name.startswith("Autocast"):
        _AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(_key)


def outside_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """run, outside the caller's autocast regions: what ATen computes in it depends on its arguments alone."""

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        if not _any_autocast():
            return run(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return run(*args)

    return call
