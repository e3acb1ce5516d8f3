"""explain(op, *args): what one call runs, and how fast it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .._runtime.backend import chosen
from .._runtime.device import FP8, KERNEL_DTYPES
from .._runtime.launch import recorded
from .._runtime.launch_path import launch_path
from .._torch.spec import REGISTRY, Op
from .explain_compiled import when_compiled
from .forecast import forecast, gpu_named
from .forecast.model import SIZES

# Dense FLOP a clock an SM for (16-bit with fp32 accumulation, TF32, fp32), from NVIDIA's architecture white papers.
_RATES = {
    (8, 0): (2048, 1024, 128), (8, 6): (512, 256, 256), (8, 9): (512, 256, 256),
    (9, 0): (4096, 2048, 256), (10, 0): (8192, 4096, 256), (12, 0): (512, 256, 256),
}  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """What a GPU can do at most: bytes a second to memory, and FLOP a second for the dtype asked about."""

    gpu: str
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Explanation:
    """What one call runs.

    backend: "triton", "interpreter" or "aten", and reason why. steps: kernels in order, as (name, grid, configuration); ATen's
    own products among them with grid 0. bytes: inputs read once and outputs written once. flops: of the products, 0 where
    there is none. seconds: the larger of bytes and flops over the GPU's limits, a prediction; None without a GPU.
    launches: which way the kernels are launched and why, "fast path" or "kernel[grid]"; empty where no compiled kernel is.
    forecast: what the kernels as they are should take, in seconds, and what binds them; None for a GPU or op without a model.
    """

    op: str
    device: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    backend: str
    reason: str
    steps: tuple[tuple[str, int, dict[str, Any]], ...] = ()
    bytes: int = 0
    flops: int = 0
    limit: Limit | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = field(default=())
    launches: str = ""
    forecast: tuple[float, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields, JSON-serialisable."""
        return asdict(self)

    def __str__(self) -> str:
        shapes = " ".join(str(tuple(shape)) for shape in self.shapes)
        lines = [f"{self.op}: {shapes} {self.dtype} on {self.device}", f"  runs      {self.backend}: {self.reason}"]
        if self.launches:
            lines.append(f"  launched  by {self.launches}")
        for name, grid, config in self.steps:
            text = " ".join(f"{key}={value}" for key, value in config.items())
            lines.append(f"  kernel    {name} grid={grid} {text}" if grid else f"  library   {name}")
        lines.append(f"  moves     {self.bytes:,} bytes at least, {self.flops:,} FLOP in products")
        if self.limit is not None and self.seconds is not None:
            rate = f"{self.limit.bytes_per_s / 1e9:,.0f} GB/s, {self.limit.flops_per_s / 1e12:,.0f} TFLOP/s"
            lines.append(
                f"  at best   {self.seconds * 1e6:,.1f} us on {self.limit.gpu} ({rate}): a prediction, not a measurement"
            )
        if self.forecast is not None:
            lines.append(
                f"  forecast  {self.forecast[0] * 1e6:,.1f} us, bound by {self.forecast[1]}: a model's, not a measurement"
            )
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines)


class _Capture(TorchDispatchMode):
    """Notes the first raw operator of a call, its arguments and its launches, and makes none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Op, tuple[Any, ...], Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        spec = next((s for s in REGISTRY.values() if func is s.fwd), None)
        if spec is None:
            return func(*args, **(kwargs or {}))
        if chosen(args[0].device.type)[0] in ("triton", "interpreter"):
            with recorded() as launches, _Products(launches):
                outputs = spec.launch(*args)
        else:
            launches = []
            meta = spec.reference(*tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, args))
            outputs = tree_map(lambda t: torch.empty_like(t, device=args[0].device), meta)
        self.seen.append((spec, args, outputs, launches))
        return outputs


class _Products(TorchDispatchMode):
    """Notes ATen's own products among the launches."""

    def __init__(self, launches: list[Any]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "linear", "_addmm_activation", "_scaled_mm"):
            self.launches.append((f"aten.{func.overloadpacket.__name__}", 0, {}))
        return func(*args, **(kwargs or {}))


def explain(op: Callable[..., Tensor] | str, *args: Any, **kwargs: Any) -> Explanation:
    """What op(*args, **kwargs) would run: backend and why, kernels with their configurations, bytes, FLOPs, time at best.

    Args:
        op: a public function (fused_layernorm), or its name in REGISTRY ("layer_norm").
        args, kwargs: as for the call; tensors that need a gradient explain the training forward.

    Returns:
        An Explanation, which prints as a few lines. Nothing is launched; outputs are allocated and dropped.

    Raises:
        ValueError: op is no fused op. What the call itself raises on bad arguments, it raises here.
    """
    found = next((s for s in REGISTRY.values() if op in (s.public, s.name, s.public.__name__)), None)
    if found is None:
        allowed = ", ".join(s.public.__name__ for s in REGISTRY.values())
        raise ValueError(f"explain: op: got {op!r}, allowed: {allowed}, or a name in REGISTRY")
    with _Capture() as capture:
        found.public(*args, **kwargs)
    if not capture.seen:
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        reason = "a torch.func transform, forward-mode AD or a tracer is active"
        return Explanation(found.name, str(first.device), str(first.dtype)[6:], (tuple(first.shape),), "aten", reason)
    spec, raw, outputs, launches = capture.seen[0]
    x = raw[0]
    backend, reason = chosen(x.device.type)
    if backend in ("triton", "interpreter") and not any(grid for _, grid, _ in launches):
        backend, reason = "aten", _why_no_kernel(x)
    if spec.reason is not None and x.is_cuda and x.dtype in (*KERNEL_DTYPES, FP8) and x.numel():
        reason = spec.reason(*raw)
    inputs = [a for a in raw if isinstance(a, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in (*inputs, *tree_leaves(outputs)) if isinstance(t, Tensor))
    from .._torch.flops import flops_of

    flops = flops_of(spec.raw[0], raw)
    limit = limit_of(x) if x.is_cuda else None
    seconds = None if limit is None else max(moved / limit.bytes_per_s, flops / limit.flops_per_s)
    notes = [f"under torch.compile: {when_compiled(spec.name)}"]
    if limit is None:
        why = "PyTorch does not tell this GPU's clocks" if x.is_cuda else "the tensors are on no GPU"
        notes.append(f"no time is predicted: {why}")
    return Explanation(
        spec.name, str(x.device), str(x.dtype)[6:], tuple(tuple(t.shape) for t in inputs), backend, reason,
        tuple(_step(*launch) for launch in launches), moved, flops, limit, seconds, tuple(notes),
        ": ".join(launch_path()) if backend == "triton" else "",
        forecast_of(spec.name, raw, torch.cuda.get_device_name(x.device)) if backend == "triton" and x.is_cuda else None,
    )  # fmt: skip


def forecast_of(op: str, raw: tuple[Any, ...], gpu: str) -> tuple[float, str] | None:
    """(seconds, what binds) of a raw operator's forward on a GPU of that name; None where no model is of it.

    raw: the operator's arguments. Softmax over another dimension than the last has no model.
    """
    coefficients, x = gpu_named(gpu), raw[0]
    if coefficients is None or not x.numel() or op not in SIZES or (op == "softmax" and raw[1] != 1):
        return None
    rows = (x.numel() // x.shape[-1], x.shape[-1])
    if SIZES[op] == 2:
        shape, activation, pass_ = rows, "none", "fwd"
    elif op == "linear":
        shape, activation, pass_ = (rows[0], *raw[1].shape), raw[3], "train_fwd" if raw[4] else "fwd"
    else:
        return None
    found = forecast(op, shape, x.element_size(), pass_, coefficients, activation=activation)
    return found.seconds, found.binding


def _why_no_kernel(x: Tensor) -> str:
    if x.dtype not in KERNEL_DTYPES:
        return f"no kernel for {str(x.dtype)[6:]}: kernels take float32, float16 and bfloat16"
    return "nothing to compute" if x.numel() == 0 else "cuBLAS, or ATen's formula for this shape"


def _step(kernel: Any, grid: int, options: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    name = kernel if isinstance(kernel, str) else getattr(kernel, "__name__", None) or kernel.fn.__name__
    shown = {k: v for k, v in options.items() if k.isupper() or k in ("num_warps", "num_stages", "num_ctas")}
    return name, grid, shown


def limit_of(x: Tensor) -> Limit | None:
    """The data sheet's limits of x's GPU from its clocks, bus and SM count; fp32 by torch's TF32 setting. None where this
    PyTorch does not tell the clocks."""
    properties = torch.cuda.get_device_properties(x.device)
    if not getattr(properties, "memory_clock_rate", 0) or not getattr(properties, "clock_rate", 0):
        return None
    bandwidth = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8
    major, minor = properties.major, properties.minor
    half, tf32, fp32 = _RATES.get((major, minor)) or _RATES.get((major, 0)) or _RATES[(8, 0)]
    rate = half if x.element_size() <= 2 else tf32 if torch.backends.cuda.matmul.allow_tf32 else fp32
    return Limit(properties.name, bandwidth, rate * properties.multi_processor_count * properties.clock_rate * 1e3)
