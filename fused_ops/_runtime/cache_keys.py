"""The keys under which Triton keeps compiled kernels on disk, the same in every process.

Under Triton 3.6 and 3.7 a kernel's key depends on whether the functions that it calls had been given theirs before, for a
kernel of another family say: the constants that they use go into it only then. A process that launches its kernels in
another order would miss, and compile again. So the called functions get their keys first.
"""

from __future__ import annotations

import types
from typing import Any


def settle(function: Any) -> None:
    """Give every function that a JITFunction calls its cache key, the innermost first, and then the function its own.

    What is no JITFunction, such as one that the interpreter runs, is left alone.
    """
    if _is_compiled(function):
        _settle(function, set())


def _is_compiled(value: Any) -> bool:
    """Whether value is a JITFunction. Its key is a property that is computed when looked at: the type is asked instead."""
    # Of the type: asking the value would give it its key, before those of what it calls.
    return hasattr(type(value), "cache_key") and isinstance(getattr(value, "fn", None), types.FunctionType)


def _settle(function: Any, seen: set[int]) -> None:
    seen.add(id(function))
    namespace = function.fn.__globals__
    names = function.fn.__code__.co_names  # the globals and the attributes that its body names
    values = [namespace[name] for name in names if name in namespace]
    values += [getattr(value, name, None) for value in values if isinstance(value, types.ModuleType) for name in names]
    for value in values:
        if id(value) not in seen and _is_compiled(value):
            _settle(value, seen)
    function.cache_key  # noqa: B018 - it is computed here, and kept
