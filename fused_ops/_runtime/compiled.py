"""Launches of compiled kernels past Triton's Python front end.

JITFunction.run binds, specialises and hashes its arguments on every call, which takes longer than all the rest of an eager
call. A `Planned` skips that. Its first call goes through kernel[grid] and keeps the compiled kernel that this returns.
Further calls give Triton's own launcher the tensors' addresses and the number of rows, with every other argument prepared
beforehand. One plan may keep several compiled kernels, because Triton specialises on whether addresses and sizes are multiples
of 16, and on sizes of 1.

Nothing that belongs to one call is kept: addresses, rows and stream are looked up each time, and nothing is allocated or
synchronised. So CUDA graphs, streams and threads need no care. A plan keeps its compiled kernels alive: Triton unloads one
that nobody holds. Whatever is not as expected goes through kernel[grid], and FUSED_OPS_LAUNCH=triton sends every launch there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .cache_keys import settle
from .faults import name_launch, name_of
from .launch_path import note_refusal, takes_fast_path, triton_version
from .scratch import ensure_allocator, scratch

SPECIALISATIONS = 64  # compiled kernels that one plan keeps
_INT32_MAX = 2**31 - 1
_Ready = Callable[[int, int, tuple[int, ...], tuple[int, ...]], None]  # (stream, grid, addresses, sizes): a launch

_settled: dict[int, Any] = {}  # by their ids, the kernels whose place in Triton's cache depends on no other
_hooks: Any = None  # triton.knobs.runtime, once triton is loaded
_address = Tensor.data_ptr


class Planned:
    """A launch, complete but for its tensors and its rows: kernel[(grid,)](*tensors, M, **options) on one device.

    The tensors of all calls have the same dtypes; the kernel's first parameters are their pointers, in order. What does not
    depend on the number of rows M is in the plan, so that a plan serves every M of one configuration.

    Attributes:
        device: the GPU's index, negative for the interpreter.
        options: the kernel's parameters by name, but for the pointers and the sizes given at a launch; and launch options
            such as num_warps.
        block, step: a program takes block rows of M; with step > 1 they lie step apart (rows.tile_rows).
        across: programs for each block of rows: tiles of columns, parts of K.
        most: the programs of a persistent kernel at the most; 0 where the grid grows with M.
        takes_rows: whether M is an argument of the kernel, the first after the pointers.
        instead: where a launch may be refused (a cluster, a compiler's pass), a function of the error that plans another one.
    """

    __slots__ = (
        "_ready", "_refused", "across", "block", "dense", "device", "instead", "kernel", "most", "options", "runs_directly", "step", "takes_rows",
    )  # fmt: skip

    def __init__(
        self, device: int, kernel: Any, options: dict[str, Any], *, block: int = 1, step: int = 1, across: int = 1, most: int = 0,
        takes_rows: bool = True,
    ) -> None:  # fmt: skip
        self.device, self.kernel, self.options = device, kernel, options
        self.block, self.step, self.across, self.most, self.takes_rows = block, step, across, most, takes_rows
        self.instead: Callable[[Exception], Planned] | None = None
        self.dense = step == 1  # whether a program's rows are neighbours
        self.runs_directly = device >= 0
        self._ready: dict[Any, _Ready] = {}
        self._refused = False  # whether a launcher took other arguments than known

    def grid(self, M: int) -> int:
        """The programs of a launch over M rows."""
        groups, rest = divmod(M, self.block * self.step)
        grid = (groups * self.step + (rest if rest < self.step else self.step)) * self.across
        return self.most if 0 < self.most < grid else grid

    def run(self, stream: int, grid: int, sizes: tuple[int, ...], tensors: tuple[Tensor, ...]) -> None:
        """Launch on the device, which is current, and on its current stream, the raw CUDA stream given. Not on a grid of 0.

        sizes: the kernel's parameters that follow the pointers, as many as options do not name.
        """
        addresses = tuple(map(_address, tensors))
        key: Any = 0  # what Triton specialises on; 0 where all is a multiple of 16
        for size in sizes:
            key = 8 * key + (0 if not size & 15 else 1 if size == 1 else 2) + (4 if size > _INT32_MAX else 0)
        for address in addresses:
            if address & 15:  # the low bits rather than "a multiple of 16": finer than need be
                key = (key, *[address & 15 for address in addresses])
                break
        ready = self._ready.get(key)
        if ready is None or self.kernel.pre_run_hooks or _is_watched():
            self._first(key, grid, sizes, tensors)
            return
        try:
            ready(stream, grid, addresses, sizes)
        except TypeError as error:  # the launcher's arguments are not what they were taken for; nothing was launched
            self._refuse(error)
            self.through_triton(grid, sizes, tensors)
        except Exception as error:
            name_launch(error, self.kernel, grid, (*tensors, *sizes), self.options)
            raise

    def through_triton(self, grid: int, sizes: tuple[int, ...], tensors: tuple[Any, ...]) -> Any:
        """Launch through kernel[grid], and return the compiled kernel."""
        return _through_triton(self.kernel, grid, (*tensors, *sizes), self.options)

    def _first(self, key: Any, grid: int, sizes: tuple[int, ...], tensors: tuple[Tensor, ...]) -> None:
        compiled = self.through_triton(grid, sizes, tensors)
        if self._refused:
            return
        try:
            ready = _direct_launch(self, compiled, len(tensors) + len(sizes))
        except AttributeError as error:  # a launcher that lacks what is known of it
            self._refuse(error)
            return
        if ready is not None:
            if len(self._ready) >= SPECIALISATIONS:
                self._ready.clear()
            self._ready[key] = ready

    def _refuse(self, error: Exception) -> None:
        """Launch through kernel[grid] from now on."""
        self._refused = True
        self._ready.clear()
        note_refusal(name_of(self.kernel), error)


def _is_watched() -> bool:
    """Whether a profiler has hooks on every launch, which only kernel[grid] calls."""
    hook = _hooks.launch_enter_hook
    exit_hook = _hooks.launch_exit_hook
    return bool((hook and getattr(hook, "calls", True)) or (exit_hook and getattr(exit_hook, "calls", True)))


def _through_triton(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Triton 3.10 will no longer contract a * b + c into one rounding by default: numerics must not depend on that.
    if id(kernel) not in _settled:
        settle(kernel)
        _settled[id(kernel)] = kernel
    ensure_allocator()
    try:
        return kernel[(grid,)](*args, **kwargs, enable_fp_fusion=True)
    except Exception as error:
        name_launch(error, kernel, grid, args, kwargs)
        raise


def _direct_launch(planned: Planned, compiled: Any, given: int) -> _Ready | None:
    """A function that launches compiled as planned, or None where Triton is not one of those known.

    given: how many of the kernel's parameters, the first, are given at a launch: pointers and sizes.
    The function holds compiled: the driver's handle in it is no longer valid once Triton lets go of it and unloads the kernel.
    """
    global _hooks
    launcher: Any = getattr(compiled, "_run", None)
    if type(launcher).__name__ != "CudaLauncher" or not takes_fast_path():
        return None
    import triton

    _hooks = triton.knobs.runtime
    names = planned.kernel.arg_names[given:]
    if not set(names) <= set(planned.options):
        return None
    constants = tuple(planned.options[name] for name in names)  # all arguments that are the plan's, in the kernel's order
    metadata = compiled.packed_metadata
    if launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return functools.partial(_launch_by_triton, launcher, compiled, constants)
    launch, cooperative, pdl = launcher.launch, launcher.launch_cooperative_grid, launcher.launch_pdl
    memory = _scratch_of(planned.device, launcher)
    if triton_version()[1] == (3, 6):
        return lambda stream, grid, addresses, sizes: launch(
            grid, 1, 1, stream, compiled.function, cooperative, pdl, memory and memory(grid), None, metadata, None, None, None,
            *addresses, *sizes, *constants,
        )  # fmt: skip
    annotations, signature = launcher.arg_annotations, launcher.kernel_signature
    return lambda stream, grid, addresses, sizes: launch(
        grid, 1, 1, stream, compiled.function, cooperative, pdl, metadata, None, None, None, memory and memory(grid), None,
        annotations, signature, addresses + sizes + constants,
    )  # fmt: skip


def _scratch_of(device: int, launcher: Any) -> Callable[[int], Tensor] | None:
    """A function of the grid that gives the memory of one launch, for kernels that make TMA descriptors; None for others."""
    size = launcher.global_scratch_size * getattr(launcher, "num_ctas", 1)
    return (lambda grid: scratch(grid * size, device)) if size else None


def _launch_by_triton(
    launcher: Any, compiled: Any, constants: tuple[Any, ...], stream: int, grid: int, addresses: tuple[int, ...],
    sizes: tuple[int, ...],
) -> None:  # fmt: skip
    """By Triton's launcher, which gives a kernel that is profiled or sanitised the memory that it asks for."""
    ensure_allocator()
    launcher(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *sizes, *constants)
