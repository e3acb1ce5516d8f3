"""Compiled kernels, kept by everything that specialises one and launched without Triton's Python front.

JITFunction.run binds, specialises and hashes its arguments on every call, which takes longer than the rest of an eager
call together. Here the first call with a new key goes that way, kernel[grid], and the compiled kernel it returns is kept;
further calls hand Triton's launcher the arguments directly. The key holds the device, each tensor's dtype and the
low bits of its address, and every other argument's value: at least all that Triton specialises on, so a key has one kernel.

Nothing is kept that belongs to one call: pointers, grid and stream are looked up each time, and no memory is allocated or
synchronised, so CUDA graphs, streams and threads need no care. Whatever is not as expected goes through kernel[grid].
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

LIMIT = 8192  # keys; sizes are in the key, and a server may see many
_Launch = Callable[[int, int, tuple[Any, ...]], None]
_kernels: dict[tuple[Any, ...], tuple[Any, _Launch]] = {}
_pointers: dict[int, int] = {}  # how many leading arguments of a kernel are pointers: those named *_ptr
_hooks: Any = None  # triton.knobs.runtime, once triton is loaded


def run(kernel: Any, grid: int, device: int, stream: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """kernel[(grid,)](*args, **kwargs) on device, which is current, and on its current stream.

    grid: more than 0. stream: the raw CUDA stream. args: tensors, as many as the kernel has parameters named *_ptr, which
    come first; then ints.
    """
    identity = id(kernel)
    count = _pointers.get(identity)
    if count is None:
        count = _pointers[identity] = sum(name.endswith("_ptr") for name in kernel.arg_names)
    tensors, sizes, options = args[:count], args[count:], kwargs.values()
    try:
        pointers = [tensor.data_ptr() for tensor in tensors]
    except AttributeError:  # no tensor where one is usual
        _through_triton(kernel, grid, args, kwargs)
        return
    # Low bits rather than "a multiple of 16": finer than need be, and one operation.
    low = [pointer & 15 for pointer in pointers]
    key = (identity, device, *low, *[tensor.dtype for tensor in tensors], *sizes, *kwargs, *options)
    kept = _kernels.get(key)
    if kept is None or kernel.pre_run_hooks or _is_watched():
        _first(kernel, grid, key, args, kwargs)
        return
    try:
        kept[1](grid, stream, (*pointers, *sizes, *options))
    except TypeError:  # the launcher's arguments are not what they were taken for; nothing was launched
        del _kernels[key]
        _through_triton(kernel, grid, args, kwargs)


def _is_watched() -> bool:
    """Whether a profiler has hooks on every launch."""
    hook = _hooks.launch_enter_hook
    exit_hook = _hooks.launch_exit_hook
    return bool((hook and getattr(hook, "calls", True)) or (exit_hook and getattr(exit_hook, "calls", True)))


def _through_triton(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Triton 3.10 will no longer contract a * b + c into one rounding by default: numerics must not depend on that.
    return kernel[(grid,)](*args, **kwargs, enable_fp_fusion=True)


def _first(kernel: Any, grid: int, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    compiled = _through_triton(kernel, grid, args, kwargs)
    launch = _direct_launch(kernel, compiled, len(args), kwargs)
    if launch is not None:
        if len(_kernels) >= LIMIT:
            _kernels.clear()
        _kernels[key] = (kernel, launch)  # the kernel too: its id is in the key


def _direct_launch(kernel: Any, compiled: Any, positional: int, kwargs: dict[str, Any]) -> _Launch | None:
    """A function (grid, stream, values) that launches compiled, or None where Triton is not one of those known.

    values: the positional arguments and kwargs' values, pointers as integers.
    """
    global _hooks
    import triton

    _hooks = triton.knobs.runtime
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    launcher: Any = getattr(compiled, "_run", None)
    if type(launcher).__name__ != "CudaLauncher" or not (3, 6) <= version <= (3, 9):
        return None
    names = [*kernel.arg_names[:positional], *kwargs]
    if not set(kernel.arg_names) <= set(names):
        return None
    in_order = operator.itemgetter(*(names.index(name) for name in kernel.arg_names))
    function, metadata = compiled.function, compiled.packed_metadata
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        # Scratch memory is allocated for each launch: by Triton's launcher.
        return lambda grid, stream, values: launcher(
            grid, 1, 1, stream, function, metadata, None, None, None, *in_order(values)
        )  # fmt: skip
    launch, cooperative, pdl = launcher.launch, launcher.launch_cooperative_grid, launcher.launch_pdl
    if version == (3, 6):
        return lambda grid, stream, values: launch(
            grid, 1, 1, stream, function, cooperative, pdl, None, None, metadata, None, None, None, *in_order(values)
        )  # fmt: skip
    annotations, signature = launcher.arg_annotations, launcher.kernel_signature
    return lambda grid, stream, values: launch(
        grid, 1, 1, stream, function, cooperative, pdl, metadata, None, None, None, None, None, annotations, signature,
        in_order(values),
    )  # fmt: skip
