"""What a GPU run looks at first: the machine, the launch path, and each op once, forward and backward. A line each.

python -m bench.probe. A check that fails says why, and the others go on; the last line counts them.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ops._torch.spec import REGISTRY, Op

from .check import LIMITS, relative_error
from .environment import clocks, environment

DTYPE = torch.bfloat16
M, K, N = 512, 1024, 4096  # rows, their length, and the features that a linear makes of it


def checks() -> list[tuple[str, Callable[[], str]]]:
    """(name, a function that returns what to say, or raises)."""
    found: list[tuple[str, Callable[[], str]]] = [("machine", _machine), ("launch path", _launch_path)]
    found += [(name, lambda spec=spec: _op(spec)) for name, spec in REGISTRY.items()]  # type: ignore[misc]
    return [*found, ("kernel[grid] gives the same bits", _same_bits), ("captured in a graph", _graph), ("memory", _memory)]


def _machine() -> str:
    properties = torch.cuda.get_device_properties(0)
    gpu = (
        f"{properties.multi_processor_count} SMs, L2 {properties.L2_cache_size >> 20} MiB, {properties.total_memory >> 30} GiB"
    )
    return "; ".join([*(f"{k} {v}" for k, v in (environment() | clocks()).items() if v), gpu])


def _launch_path() -> str:
    from fused_ops._runtime.launch_path import launch_path

    way, reason = launch_path()
    return f"{way}: {reason}"


def _op(spec: Op) -> str:
    """The op's largest sample on the GPU against the same call in fp64 on its torch function."""
    sample = max(spec.samples("cpu", DTYPE), key=lambda s: max(a.numel() for a in s.args if isinstance(a, Tensor)))

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.detach().cuda()
        return moved.requires_grad_() if spec.trains and moved.is_floating_point() else moved

    args, kwargs = [move(a) for a in sample.args], {k: move(v) for k, v in sample.kwargs.items()}
    start = time.perf_counter()
    out = _first(spec.public(*args, **kwargs))
    torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    said = f"{sample.name}: first call {first_s:.2f} s"
    wide = [_widen(a) for a in args]
    expected = _first(spec.torch_fn(*wide, **kwargs))
    pairs = [("y", out, expected)]
    if spec.trains:
        dy = torch.randn_like(out)
        leaves = [(a, w) for a, w in zip(args, wide) if isinstance(a, Tensor) and a.requires_grad]
        grads = torch.autograd.grad(out, [a for a, _ in leaves], dy)
        wanted = torch.autograd.grad(expected, [w for _, w in leaves], dy.double())
        pairs += [(f"gradient {i}", g, w) for i, (g, w) in enumerate(zip(grads, wanted))]
    for what, got, want in pairs:
        error, limit = relative_error(got, want.float()), LIMITS[DTYPE] if got.dtype is not torch.float8_e4m3fn else 0.1
        said += f"; {what} {error:.2g}"
        if not error <= limit:
            raise AssertionError(f"{said}: more than {limit:g}")
    return said


def _widen(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_(value.requires_grad) if floating else value


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _same_bits() -> str:
    """The direct launcher and kernel[grid] on the same numbers; and what a call costs each way."""
    from fused_ops._runtime import compiled

    said = []
    for name, spec in REGISTRY.items():
        sizes = (M, N, K)[: len(next(iter(spec.bench.shapes.values())))]
        activation = next(filter(None, spec.bench.variants), None)
        args, kwargs = spec.bench.make("cuda", sizes, DTYPE, activation)

        def call(spec: Op = spec, args: Any = args, kwargs: Any = kwargs) -> Tensor:
            return _first(spec.public(*args, **kwargs)).view(torch.uint8)

        direct, times = call(), [_host_us(call)]
        before = compiled.Planned.run
        compiled.Planned.run = lambda self, stream, tensors: self.through_triton(tensors)  # type: ignore[method-assign]
        try:
            other, _ = call(), times.append(_host_us(call))
        finally:
            compiled.Planned.run = before  # type: ignore[method-assign]
        if not torch.equal(direct, other):
            raise AssertionError(f"{name}: the two ways differ by in {int((direct != other).sum())} bytes")
        said.append(f"{name} {times[0]:.1f} us directly, {times[1]:.1f} us through kernel[grid]")
    return "; ".join(said)


def _host_us(call: Callable[[], Any], calls: int = 200) -> float:
    """Wall microseconds until a call returns, without waiting for the GPU."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / calls * 1e6


def _graph() -> str:
    from fused_ops import fused_layernorm, fused_linear

    x = torch.randn(M, K, device="cuda", dtype=DTYPE)
    w, m = torch.randn(K, device="cuda", dtype=DTYPE), torch.randn(N, K, device="cuda", dtype=DTYPE)

    def call() -> Tensor:
        return fused_linear(fused_layernorm(x, (K,), w, w), m, None, "gelu")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(captured, call()):
        raise AssertionError("the replay on new inputs is not what a call gives")
    return "a replay on new inputs gives what a call gives"


def _memory() -> str:
    return f"{torch.cuda.max_memory_allocated() >> 20} MiB at the most"


def _failure(name: str, check: Callable[[], str]) -> str:
    """Make a check and print what it says. Returns why it failed, or ""."""
    try:
        print(f"{name}: {check()}", flush=True)
    except Exception as error:
        traceback.print_exc()
        reason = f"{name}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        print(f"FAILED {reason}", flush=True)
        return reason
    return ""


def main() -> int:
    if not torch.cuda.is_available():
        print("bench.probe: needs a CUDA device")
        return 2
    torch.manual_seed(0)
    found = checks()
    failed = [reason for reason in (_failure(name, check) for name, check in found) if reason]
    print(f"probe: {len(found) - len(failed)} of {len(found)} hold" + "".join(f"; {f}" for f in failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
