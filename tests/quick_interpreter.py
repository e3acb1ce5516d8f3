"""Triton's interpreter without what it does again and again: the same operations on the same numbers, in a third of the time.

For the length of a launch the interpreter replaces the functions of triton.language by its own. Triton does so at every call
of a device function too, around the replacements that are there already: each reads all names of four modules, and a call of
tl.load goes through as many layers as there were calls before it. Here a launch replaces them once, for all functions of it.

Each operation makes a type of its result, and the type's shape, from nothing; here equal shapes are made once. Each operation
on integers of less than 64 bits is made in 64 bits too, and the results compared with the limits, for an assertion that is
made in debug mode only; here it is left out where it is not made.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

NEEDED = (
    "GridExecutor",
    "InterpretedFunction",
    "InterpreterError",
    "_LangPatchScope",
    "_convert_float",
    "_get_np_dtype",
    "_patch_attr",
    "_patch_lang",
    "interpreter_semantic",
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


def _patch_attr(of: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Triton's own makes a second dictionary of the names at each call, and in some versions a semantic for each name."""
    semantic = interpreter.interpreter_semantic

    def of_launch(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    scope.set_attr(of, name, of_launch)


def _init_of_block(tritons: Callable[..., None]) -> Callable[..., None]:
    """Blocks of equal shapes share one shape, the number of elements and the shape's text."""

    @functools.cache
    def of_integers(*sizes: int) -> tuple[Any, int, str]:
        block = object.__new__(tl.block_type)
        tritons(block, tl.int1, tl.tuple(sizes))
        return block.shape, block.numel, str(block.shape)

    @functools.cache
    def of_shape(*sizes: Any) -> tuple[Any, int, str]:
        return of_integers(*(size.value if isinstance(size, tl.constexpr) else size for size in sizes))

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel, text = of_shape(*shape)
        self.name = f"<{text}, {element_ty}>"

    return init


@functools.cache
def _shape_of_tensor(*sizes: int) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _shape_of_tensor(*type.shape.values) if type.is_block() else _shape_of_tensor()


def _check_overflow(tritons: Callable[..., None]) -> Callable[..., None]:
    def check(self: Any, *operands: Any) -> None:
        if self.builder.options.debug:
            tritons(self, *operands)

    return check


def _cast(tritons: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, input: Any, dst_ty: Any, *rounding: Any, **named: Any) -> Any:
        return input if input.type.scalar is dst_ty.scalar else tritons(self, input, dst_ty, *rounding, **named)

    return cast


def _operands(tritons: Callable[..., Any]) -> Callable[..., Any]:
    def operands(self: Any, lhs: Any, rhs: Any, *rules: Any, **named: Any) -> Any:
        """Two tensors of one element type and one shape stay as they are, but where both are pointers or a division is meant."""
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and len(rules) < 4 and "div_or_mod" not in named:
            equal = lhs.dtype is rhs.dtype and lhs.shape is rhs.shape
            if equal and lhs.type.is_block() == rhs.type.is_block() and not isinstance(lhs.dtype, tl.pointer_type):
                return lhs, rhs
        return tritons(self, lhs, rhs, *rules, **named)

    return operands


def _broadcast(tritons: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        same = lhs.shape is rhs.shape and lhs.type.is_block() == rhs.type.is_block()
        return (lhs, rhs) if same else tritons(self, lhs, rhs)

    return broadcast


def _convert_float(tritons: Callable[..., Any]) -> Callable[..., Any]:
    """bf16 is the upper half of fp32, and the interpreter cuts the lower half off. Subnormal numbers it converts otherwise."""

    def subnormal(bits: Any, mantissa: int) -> bool:
        magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
        return bool((magnitude - bits.dtype.type(1) < (1 << mantissa) - 1).any())  # 0 - 1 is the largest

    def convert(input: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if (input_dtype, output_dtype) == (tl.bfloat16, tl.float32):
            bits = input.view(np.uint16)
            if not subnormal(bits, 7):
                return np.left_shift(bits, 16, dtype=np.uint32)
        if rounding_mode is None and (input_dtype, output_dtype) == (tl.float32, tl.bfloat16):
            bits = input.view(np.uint32)
            if not subnormal(bits, 23):
                return np.right_shift(bits, 16).astype(np.uint16)
        return tritons(input, input_dtype, output_dtype, rounding_mode)

    return convert


def _replacements() -> list[tuple[Any, str, Any]]:
    numpy_dtype = functools.partial(_of_scalar, functools.cache(interpreter._get_np_dtype))
    whole = [
        (interpreter, "_patch_lang", _patch_lang),
        (interpreter, "_patch_attr", _patch_attr),
        (interpreter, "_get_np_dtype", numpy_dtype),
        (interpreter.InterpretedFunction, "__call__", _call),
        (tl.tensor, "__init__", _init_tensor),
    ]
    around = [
        (interpreter, "_convert_float", _convert_float),
        (tl.block_type, "__init__", _init_of_block),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow),
        (TritonSemantic, "binary_op_type_checking_impl", _operands),
        (TritonSemantic, "broadcast_impl_value", _broadcast),
        (TritonSemantic, "cast", _cast),
    ]
    return whole + [(of, name, made(vars(of)[name])) for of, name, made in around]


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
