"""A CPU that runs the kernels' PTX: every launch inside `Device` is compiled for an architecture and executed in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..._runtime import device as device_module
from .. import REGISTRY, forget_plans, watch_launches
from .grid import run_grid
from .machine import Code
from .memory import Global, Traffic
from .text import Parser

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_compiled: dict[Any, tuple[Any, Code]] = {}
_change: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch that was run: the kernel's name, its programs, what Triton compiled, and what it moved.

    remote_reads: reads of other programs' shared memory, in clusters.
    """

    kernel: str
    programs: int
    compiled: Any
    traffic: Traffic
    remote_reads: int


def specialised(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """(signature, constants, attributes) as Triton's launcher would choose them: an int of 1 is a constant, and it is noted
    where 16 divides an int or an address."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        divisible = False
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{name}: {value!r}")
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _compile(kernel: Any, values: dict[str, Any], options: dict[str, Any], arch: int) -> tuple[Any, Code, list[str]]:
    signature, constants, attributes = specialised(kernel, values)
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    key = (kernel, arch, *signature.items(), *constants.items(), *attributes, *options.items())
    if key not in _compiled:
        source = _source_of(kernel)(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
        _compiled[key] = compiled, Code(Parser(compiled.asm["ptx"]).program)
    compiled, code = _compiled[key]
    return compiled, code if _change is None else Code(Parser(_change(compiled.asm["ptx"])).program), names


def _source_of(kernel: Any) -> Any:
    """What Triton compiles a kernel from: Gluon has a class of its own."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


@contextmanager
def altered(change: Callable[[str], str]) -> Iterator[None]:
    """While active, kernels run as change makes them of their PTX: for tests that take away what a kernel needs."""
    global _change
    _change = change
    try:
        yield
    finally:
        _change = None


class Device:
    """Stands for a GPU of compute capability arch (80, 90): `launches` is what ran."""

    def __init__(self, arch: int, seed: int | None = None) -> None:
        self.arch, self.seed = arch, seed
        self.launches: list[Launch] = []

    def run(self, kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Compile and run one launch, on copies of the memory that the tensors lie in, and copy it back."""
        options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
        names = [name for name in kernel.arg_names if name not in kwargs]
        values = {**dict(zip(names, args)), **{k: v for k, v in kwargs.items() if k not in OPTIONS}}
        compiled, code, parameters = _compile(kernel, values, options, self.arch)
        memory, addresses, storages = Global(), {}, []
        for name in parameters:
            value = values[name]
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in addresses:
                storage = value.untyped_storage()
                content = _bytes(storage)
                addresses[storage.data_ptr()] = memory.add(name, content, storage.data_ptr())
                storages.append(storage)
        bits = [_bits(values[name], addresses) for name in parameters]
        metadata = compiled.metadata
        ctas = getattr(metadata, "num_ctas", 1)
        scratch = getattr(metadata, "global_scratch_size", 0) or 0
        bits += [memory.add("scratch", np.zeros(scratch * grid * ctas, np.uint8)), 0]
        bits = bits[: len(code.program.parameters)]
        remote_reads = sum(m.shared.remote_reads for m in run_grid(code, memory, bits, grid, metadata.shared, ctas, self.seed))
        for i, storage in enumerate(storages):
            _bytes(storage)[:] = memory.content(i)
        self.launches.append(Launch(kernel.__name__, grid, compiled, memory.finish(), remote_reads))
        return True


def _bytes(storage: Any) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _bits(value: Any, addresses: dict[int, int]) -> int:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return addresses[storage.data_ptr()] + value.data_ptr() - storage.data_ptr()
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return value


class _Launchers(TorchDispatchMode):
    """The raw operators of fused_ops on CPU tensors go to their kernel launchers."""

    def __init__(self) -> None:
        super().__init__()
        self.launchers = {raw.overload: raw.launch for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.launchers.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def device(arch: int, sms: int = 4, seed: int | None = None) -> Iterator[Device]:
    """While active, fused_ops runs its kernels on CPU tensors as compiled for arch, and chooses for it."""
    gpu = Device(arch, seed)
    before = device_module.INTERPRETER_CAPABILITY, device_module.INTERPRETER_SMS
    device_module.INTERPRETER_CAPABILITY, device_module.INTERPRETER_SMS = divmod(arch, 10), sms
    watcher = watch_launches(gpu.run)
    forget_plans()
    try:
        with _Launchers():
            yield gpu
    finally:
        watch_launches(watcher)
        device_module.INTERPRETER_CAPABILITY, device_module.INTERPRETER_SMS = before
        forget_plans()
