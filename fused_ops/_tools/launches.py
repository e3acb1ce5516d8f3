"""Which kernels a call launches, and how each is specialised, without memory and without a GPU.

The call runs on fake tensors: the launchers see the real sizes, strides and device properties, choose their configurations,
and launch nothing. What they would have launched is noted as Triton's compiler sees it. The tensors are torch's fake CPU
tensors that say that they are on a GPU: autograd on fake CUDA tensors would need the GPU's driver.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .._runtime import clusters, device, launch, tables
from .._runtime.plans import forget_plans
from .._torch import eager
from .._torch.spec import REGISTRY

ALIGNMENT = 16  # bytes: Triton specialises on whether a pointer is a multiple of it
DEVICE = "cpu"  # where a call makes its tensors inside `listed`


@dataclass(frozen=True)
class Gpu:
    """What configurations are chosen by: a GPU's name, compute capability and SM count."""

    name: str
    capability: tuple[int, int]
    sms: int

    @classmethod
    def parse(cls, text: str) -> Gpu:
        """The GPU of "NVIDIA H100 80GB HBM3,9.0,132". Raises ValueError on anything else."""
        name, *rest = (part.strip() for part in text.split(","))
        try:
            capability, sms = rest
            major, minor = map(int, capability.split("."))
            count = int(sms)
        except ValueError:
            raise ValueError(f"got {text!r}, allowed: a name, a compute capability and an SM count, as Test,9.0,132") from None
        if not name or major < 1 or minor < 0 or count < 1:
            raise ValueError(f"got {text!r}, allowed: a name, a compute capability and an SM count, as Test,9.0,132")
        return cls(name, (major, minor), count)

    @classmethod
    def current(cls) -> Gpu:
        """The current CUDA device."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


@dataclass(frozen=True)
class Pointer:
    """A tensor argument as Triton's compiler sees it: a dtype, and an address that is a multiple of 16 bytes or not.

    elements: how many it has, which the compiler does not see.
    """

    dtype: torch.dtype
    aligned: bool = True
    elements: int = field(default=0, compare=False)

    def data_ptr(self) -> int:
        return ALIGNMENT if self.aligned else 1

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One launch: kernel[(grid,)](*args, **options), with tensors as `Pointer`.

    module, kernel: where the JITFunction is. options: pairs, in the order in which they were passed.
    """

    module: str
    kernel: str
    grid: int
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def function(self) -> Any:
        """The JITFunction."""
        return getattr(importlib.import_module(self.module), self.kernel)

    def specialisation(self) -> tuple[Any, ...]:
        """Equal for launches that run one compiled kernel: Triton compiles for a size of 1, a multiple of 16, or any other."""
        function = self.function()
        constant = {parameter.name for parameter in function.params if parameter.is_constexpr}
        options = [
            (name, value if name in constant or name not in function.arg_names else _as_compiled(value))
            for name, value in self.options
        ]
        args = [
            value if name in constant else _as_compiled(value)
            for name, value in zip(function.arg_names, self.args, strict=False)
        ]
        return self.module, self.kernel, tuple(args), tuple(sorted(options, key=lambda pair: pair[0]))

    def work(self) -> tuple[int, int]:
        """How long it takes to compile, as a sort key: products over TMA descriptors, other products, then rows by length."""
        products = ("linear", "gate", "product")
        level = 2 if "_tma" in self.kernel else 1 if any(word in self.kernel for word in products) else 0
        sizes = [value for name, value in self.options if name.startswith("BLOCK_") and type(value) is int]
        elements = 1
        for size in sizes:
            elements *= max(size, 1)
        return level, elements


@dataclass(frozen=True)
class AtenCall:
    """One of ATen's kernels beside ours: its operator, the bytes that its tensors have, and the sizes (M, N, K) of a product."""

    name: str
    nbytes: int
    itemsize: int
    product: tuple[int, int, int] | None = None


def _as_compiled(value: Any) -> Any:
    """A number as far as the compiler looks at it; anything else as it is."""
    if type(value) is not int:
        return float if type(value) is float else value
    return int, value == 1, value % ALIGNMENT == 0, -(2**31) <= value < 2**31


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each specialisation, in order."""
    found: dict[tuple[Any, ...], Launch] = {}
    for one in launches:
        found.setdefault(one.specialisation(), one)
    return list(found.values())


@contextlib.contextmanager
def listed(gpu: Gpu, dispatched: bool = False, everything: list[Launch | AtenCall] | None = None) -> Iterator[list[Launch]]:
    """While active, tensors that are made on `DEVICE` or on "cuda" are fake, and launches are noted in the list, not made.

    everything: a list that gets the launches and ATen's kernels, in order.

    dispatched: the public functions go through torch's dispatcher, as they do under a dispatch mode (ContractMode); else they
    take their fast path, as in a plain call. Not thread-safe: it replaces what the launchers ask the driver.
    """
    launches: list[Launch] = []
    thread = threading.get_ident()

    def record(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if threading.get_ident() != thread:
            return False
        one = Launch(kernel.fn.__module__, kernel.fn.__name__, grid, tuple(map(_argument, args)), tuple(kwargs.items()))
        launches.append(one)
        if everything is not None:
            everything.append(one)
        return True

    replacements: list[tuple[Any, str, Any]] = [
        (launch, "_recorder", record),
        (device, "_cuda_properties", lambda _: (gpu.capability, gpu.sms)),
        (torch.cuda, "is_available", lambda: True),  # asking would start the driver, and so would False
        (FakeTensor, "is_cuda", True),
        (FakeTensor, "is_cpu", False),
        (FakeTensor, "get_device", lambda _: 0),
        (FakeTensor, "data_ptr", _address),
    ]
    if not dispatched:
        replacements += [
            (eager, "_ORDINARY_TYPES", eager._ORDINARY_TYPES | {FakeTensor}),
            (eager, "_modes", lambda: 0),
        ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(replaced(owner, name, value))
        forget_plans()
        stack.callback(forget_plans)
        stack.enter_context(_tables_of(gpu))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        fake = FakeTensorMode if everything is None else functools.partial(_Noting, everything)
        stack.enter_context(fake(allow_non_fake_inputs=True))
        stack.enter_context(Launcher())
        yield launches


class _Noting(FakeTensorMode):
    """Fake tensors, with a note of each operator that would run a kernel of ATen's or cuBLAS."""

    def __init__(self, everything: list[Launch | AtenCall], **options: Any) -> None:
        super().__init__(**options)
        self.everything, self.depth = everything, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.depth += 1
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.depth -= 1
        if self.depth == 0 and func.namespace == "aten" and (call := _aten_call(func, args, result)) is not None:
            self.everything.append(call)
        return result


_PRODUCTS = {"mm": 0, "addmm": 1, "_addmm_activation": 1, "_scaled_mm": 0}  # the place of the first factor


def _aten_call(func: Any, args: tuple[Any, ...], result: Any) -> AtenCall | None:
    """What an operator is as a kernel; None where it only makes a view, or memory."""
    name = func.overloadpacket.__name__
    outputs = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    if views or not outputs or "empty" in name or name in ("detach", "alias", "lift_fresh"):
        return None
    inputs = [a for a in args if isinstance(a, Tensor)]
    itemsize = (inputs or outputs)[0].element_size()
    product = None
    if name in _PRODUCTS:
        a, b = args[_PRODUCTS[name] :][:2]
        product = (a.shape[0], b.shape[1], a.shape[1])
        itemsize = a.element_size()
    elif name == "linear":
        product = (args[0].numel() // args[0].shape[-1], args[1].shape[0], args[1].shape[1])
    return AtenCall(name, sum(t.numel() * t.element_size() for t in (*inputs, *outputs)), itemsize, product)


class Launcher(TorchDispatchMode):
    """Raw operators run their launchers, where fake tensors would get the reference; what is for a GPU is made on `DEVICE`."""

    def __init__(self) -> None:
        super().__init__()
        self.launchers: dict[Any, Callable[..., Any]] = {}
        for spec in REGISTRY.values():
            self.launchers[spec.fwd] = spec.launch
            if spec.trains:
                self.launchers[spec.bwd] = spec.raw[1].launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(kwargs.get("device"), "type", "") == "cuda":
            kwargs = {**kwargs, "device": torch.device(DEVICE)}
        return self.launchers.get(func, func)(*args, **kwargs)


def fake_on_gpu(value: Any) -> Any:
    """A CPU tensor as a fake one on the GPU, inside `listed`: its strides and storage offset kept. Anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 0:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
    extent = value.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
    storage = torch.empty((extent,), dtype=value.dtype, device=DEVICE)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def _argument(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return Pointer(value.dtype, _address(value) % ALIGNMENT == 0, value.numel())


def _address(tensor: Tensor) -> int:
    """A multiple of 16 where the real address would be one: memory is allocated at multiples of 512 bytes."""
    return int(tensor.storage_offset()) * tensor.element_size()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name = value, until the block ends. A name that owner has only by inheritance is removed then."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _tables_of(gpu: Gpu) -> Iterator[None]:
    """The tuned configurations of gpu are those of device 0, which fake tensors are on."""
    import triton

    before = dict(tables._tables)
    owner = tables.Machine(gpu.name, triton.__version__, clusters.can_cluster(0))
    tables._tables[0] = tables.load(owner)
    try:
        yield
    finally:
        tables._tables.clear()
        tables._tables.update(before)
