"""Launches of compiled kernels past Triton's Python front end.

JITFunction.run binds, specialises and hashes its arguments on every call, which takes longer than all the rest of an eager
call. A `Planned` skips that. Its first call goes through kernel[grid] and keeps the compiled kernel that this returns.
Further calls give Triton's own launcher the tensors' addresses, with every other argument prepared beforehand. One plan may
keep several compiled kernels, because Triton specialises on whether addresses are multiples of 16.

Nothing that belongs to one call is kept: addresses and stream are looked up each time, and nothing is allocated or
synchronised. So CUDA graphs, streams and threads need no care. A plan keeps its compiled kernels alive: Triton unloads one
that nobody holds. Whatever is not as expected goes through kernel[grid], and FUSED_OPS_LAUNCH=triton sends every launch there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .cache_keys import settle
from .faults import name_launch, name_of
from .launch_path import note_refusal, takes_fast_path, triton_version

LIMIT = 8192  # plans that `run` keeps; sizes are in their keys, and a server may see many
ALIGNMENTS = 64  # compiled kernels that one plan keeps
_ALIGNED = 0  # the key of a plan's compiled kernel for addresses that are all multiples of 16
_Ready = Callable[[int, tuple[int, ...]], None]  # (stream, addresses): a launch

_kept: dict[tuple[Any, ...], Planned] = {}
_pointers: dict[int, tuple[int, Any]] = {}  # by a kernel's id: how many of its leading arguments are *_ptr, and the kernel
_settled: dict[int, Any] = {}  # by their ids, the kernels whose place in Triton's cache depends on no other
_hooks: Any = None  # triton.knobs.runtime, once triton is loaded
_address = Tensor.data_ptr


class Planned:
    """One launch, complete but for its tensors: kernel[(grid,)](*tensors, *sizes, **options) on one device.

    The tensors of all calls have the same dtypes; the kernel's first parameters are their pointers, in order.

    Attributes:
        device: the GPU's index, negative for the interpreter.
        sizes: ints, the parameters that follow the pointers.
        options: the remaining parameters by name, and launch options such as num_warps.
        instead: where the GPU may refuse this launch (a cluster), a function that plans another one; else None.
    """

    __slots__ = ("_ready", "_refused", "device", "grid", "instead", "kernel", "options", "runs_directly", "sizes")

    def __init__(self, device: int, kernel: Any, grid: int, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
        self.device, self.kernel, self.grid, self.sizes, self.options = device, kernel, grid, sizes, options
        self.runs_directly = device >= 0 and grid != 0
        self.instead: Callable[[], Planned] | None = None
        self._ready: dict[Any, _Ready] = {}
        self._refused = False  # whether a launcher took other arguments than known

    def run(self, stream: int, tensors: tuple[Tensor, ...]) -> None:
        """Launch on the device, which is current, and on its current stream, the raw CUDA stream given. Not on a grid of 0."""
        addresses = tuple(map(_address, tensors))
        key: Any = _ALIGNED
        for address in addresses:
            if address & 15:  # the low bits rather than "a multiple of 16": finer than need be
                key = tuple([address & 15 for address in addresses])
                break
        ready = self._ready.get(key)
        if ready is None or self.kernel.pre_run_hooks or _is_watched():
            self._first(key, tensors)
            return
        try:
            ready(stream, addresses)
        except TypeError as error:  # the launcher's arguments are not what they were taken for; nothing was launched
            self._refuse(error)
            self.through_triton(tensors)
        except Exception as error:
            name_launch(error, self.kernel, self.grid, (*tensors, *self.sizes), self.options)
            raise

    def through_triton(self, tensors: tuple[Any, ...]) -> Any:
        """Launch through kernel[grid], and return the compiled kernel."""
        return _through_triton(self.kernel, self.grid, (*tensors, *self.sizes), self.options)

    def _first(self, key: Any, tensors: tuple[Tensor, ...]) -> None:
        compiled = self.through_triton(tensors)
        if self._refused:
            return
        try:
            ready = _direct_launch(self, compiled, len(tensors))
        except AttributeError as error:  # a launcher that lacks what is known of it
            self._refuse(error)
            return
        if ready is not None:
            if len(self._ready) >= ALIGNMENTS:
                self._ready.clear()
            self._ready[key] = ready

    def _refuse(self, error: Exception) -> None:
        """Launch through kernel[grid] from now on."""
        self._refused = True
        self._ready.clear()
        note_refusal(name_of(self.kernel), error)


def run(kernel: Any, grid: int, device: int, stream: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """kernel[(grid,)](*args, **kwargs) by a plan that is made on the first call of its kind, and kept.

    args: tensors, as many as the kernel has parameters named *_ptr, which come first; then ints. The others: as Planned.
    """
    identity = id(kernel)
    known = _pointers.get(identity)
    if known is None:
        known = _pointers[identity] = sum(name.endswith("_ptr") for name in kernel.arg_names), kernel
    count = known[0]
    tensors, sizes = args[:count], args[count:]
    try:
        dtypes = [tensor.dtype for tensor in tensors]
    except AttributeError:  # no tensor where one is usual
        _through_triton(kernel, grid, args, kwargs)
        return
    key = (identity, grid, device, *dtypes, *sizes, *kwargs, *kwargs.values())
    planned = _kept.get(key)
    if planned is None:
        if len(_kept) >= LIMIT:
            _kept.clear()
        planned = _kept[key] = Planned(device, kernel, grid, sizes, kwargs)  # it holds the kernel, whose id is in the key
    planned.run(stream, tensors)


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
    try:
        return kernel[(grid,)](*args, **kwargs, enable_fp_fusion=True)
    except Exception as error:
        name_launch(error, kernel, grid, args, kwargs)
        raise


def _direct_launch(planned: Planned, compiled: Any, pointers: int) -> _Ready | None:
    """A function (stream, addresses) that launches compiled as planned, or None where Triton is not one of those known.

    The function holds compiled: the driver's handle in it is no longer valid once Triton lets go of it and unloads the kernel.
    """
    global _hooks
    launcher: Any = getattr(compiled, "_run", None)
    if type(launcher).__name__ != "CudaLauncher" or not takes_fast_path():
        return None
    import triton

    _hooks = triton.knobs.runtime
    names = planned.kernel.arg_names[pointers:]
    values = {**dict(zip(names, planned.sizes)), **planned.options}
    if not set(names) <= set(values):
        return None
    constants = tuple(values[name] for name in names)  # all arguments after the pointers, in the kernel's order
    grid, metadata = planned.grid, compiled.packed_metadata
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        # Scratch memory is allocated for each launch: by Triton's launcher.
        return lambda stream, addresses: launcher(
            grid, 1, 1, stream, compiled.function, metadata, None, None, None, *addresses, *constants
        )  # fmt: skip
    launch, cooperative, pdl = launcher.launch, launcher.launch_cooperative_grid, launcher.launch_pdl
    if triton_version()[1] == (3, 6):
        return lambda stream, addresses: launch(
            grid, 1, 1, stream, compiled.function, cooperative, pdl, None, None, metadata, None, None, None, *addresses, *constants
        )  # fmt: skip
    annotations, signature = launcher.arg_annotations, launcher.kernel_signature
    return lambda stream, addresses: launch(
        grid, 1, 1, stream, compiled.function, cooperative, pdl, metadata, None, None, None, None, None, annotations, signature,
        addresses + constants,
    )  # fmt: skip
