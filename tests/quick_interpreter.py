"""Triton's interpreter without what it does again and again: the same operations on the same numbers, in half the time.

For the length of a launch the interpreter replaces the functions of triton.language by its own. Triton does so at every call
of a device function too, around the replacements that are there already: each reads all names of four modules, and a call of
tl.load goes through as many layers as there were calls before it. Here a launch replaces them once, for all functions of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

NEEDED = (
    "GridExecutor",
    "InterpretedFunction",
    "InterpreterError",
    "_LangPatchScope",
    "_get_np_dtype",
    "_patch_attr",
    "_patch_lang",
)
KNOWN = all(hasattr(interpreter, name) for name in NEEDED)  # of Triton 3.6 and later
REPLACED_IN = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
_REPLACED: list[tuple[Any, str, Any]] = []  # (module or class, name, Triton's own)


@functools.cache
def _builtins(of: Any) -> tuple[tuple[str, Any], ...]:
    """The names and values of a module or class that a launch replaces, as they are while none runs."""
    return tuple((name, member) for name, member in inspect.getmembers(of) if tl.core.is_builtin(member))


def _patch_lang(_function: Any) -> Any:
    """Replace them for every device function, whichever of triton.language and its core that one names."""
    scope = interpreter._LangPatchScope()
    for of in REPLACED_IN:
        for name, member in _builtins(of):
            interpreter._patch_attr(of, name, member, interpreter.interpreter_builder, scope)
    interpreter._patch_lang_tensor(tl.tensor, scope)
    for language in (tl, tl.core):
        interpreter._patch_lang_core(language, scope)
    return scope


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of a device function, inside a launch: what it needs is in place."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _of_scalar(numpy_dtype: Any, dtype: Any) -> Any:
    """numpy's dtype of the elements of a block, of a pointer, or of a scalar; the interpreter makes a table at each question."""
    return numpy_dtype(tl.uint64 if isinstance(dtype.scalar, tl.pointer_type) else dtype.scalar)


def _replacements() -> list[tuple[Any, str, Any]]:
    numpy_dtype = functools.partial(_of_scalar, functools.cache(interpreter._get_np_dtype))
    return [
        (interpreter, "_patch_lang", _patch_lang),
        (interpreter, "_get_np_dtype", numpy_dtype),
        (interpreter.InterpretedFunction, "__call__", _call),
    ]


@contextlib.contextmanager
def tritons_own() -> Iterator[None]:
    """While active, Triton's interpreter as it is."""
    mine = [(of, name, vars(of)[name]) for of, name, _ in _REPLACED]
    for of, name, value in _REPLACED:
        setattr(of, name, value)
    try:
        yield
    finally:
        for of, name, value in mine:
            setattr(of, name, value)


def install() -> None:
    """For the rest of this process. Nothing where this Triton's interpreter is made in another way."""
    if not KNOWN or _REPLACED:
        return
    for of in REPLACED_IN:
        _builtins(of)
    for of, name, value in _replacements():
        _REPLACED.append((of, name, vars(of)[name]))
        setattr(of, name, value)
