"""Triton's own driver and launcher on a libcuda that only records. Run as a program; the process is the stub's alone.

python -m tests.runtime.stub_driver build FOLDER      compile the stub
python -m tests.runtime.stub_driver check [few]       launch kernels both ways and print what differs, as JSON; few: in one dtype
python -m tests.runtime.stub_driver count             print how many calls in Python and C a launch makes, as JSON
python -m tests.runtime.stub_driver time              print host times a call, as JSON: for people, no test reads them

All but `build` need LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH to name FOLDER, as in test_launch.py.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIELDS = (
    "grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared", "stream", "function", "attributes", "cluster", "params",
)  # fmt: skip
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}


def build(folder: str) -> None:
    """Compile the stub as FOLDER/libcuda.so.1, against the cuda.h that comes with Triton."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(Path(__file__).with_name("stub_cuda.c")), "-o", f"{folder}/libcuda.so.1"], check=True)


class Stub:
    """The recorded launches, and a device and a stream that are current a thread."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.stub_launches.restype = self.library.stub_unloaded.restype = ctypes.c_long
        self.current = threading.local()
        self._install()

    def device(self) -> int:
        return getattr(self.current, "device", 0)

    def stream(self, _: int = 0) -> int:
        return getattr(self.current, "stream", 0)

    def _install(self) -> None:
        """Make Triton and fused_ops see the stub: CPU tensors pass for tensors of the current device."""
        import torch
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        from fused_ops._runtime import device as device_module
        from fused_ops._runtime import launch as launch_module
        from fused_ops._runtime import tables

        active = CudaDriver()
        active.get_current_device, active.get_current_stream = self.device, self.stream
        active.get_device_capability = lambda *_: (9, 0)
        driver.set_active(active)
        launch_module._current_device, launch_module._current_stream = self.device, self.stream
        device_module._cuda_properties = lambda _: ((9, 0), 132)  # type: ignore[assignment]
        tables._tables.update({device: {} for device in range(8)})  # this device has no name, and nothing was measured on it
        torch.Tensor.get_device = lambda _: self.device()  # type: ignore[method-assign, assignment]

    def launches(self) -> int:
        return int(self.library.stub_launches())

    def unloaded(self) -> int:
        return int(self.library.stub_unloaded())

    def expect(self, signature: dict[str, str]) -> None:
        """Say what the parameters of the kernels to come are: their Triton types, constexprs aside."""
        sizes = [8 if t.startswith("*") else BYTES[t] for t in signature.values() if t != "constexpr"] + [8, 8]
        self.library.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def last(self) -> dict[str, Any]:
        """What the last launch was."""
        out = (ctypes.c_ulonglong * 76)()
        self.library.stub_last(out)
        launch: dict[str, Any] = dict(zip(FIELDS, out))
        launch["values"] = list(out[12 : 12 + launch["params"]])
        return launch


class Compare:
    """Stands for Planned.run: every launch is done by kernel[grid], by the first call and by the direct path."""

    def __init__(self, stub: Stub) -> None:
        from fused_ops._runtime import compiled as compiled_module

        self.stub, self.original = stub, compiled_module.Planned.run
        self.through, self.seen, self.wrong = 0, 0, []
        self.clusters: list[list[int]] = []  # (programs of the kernel, programs launched, programs a cluster)
        through = compiled_module._through_triton

        def counted(*args: Any) -> Any:
            self.through += 1
            return through(*args)

        self.triton = through
        compiled_module._through_triton = counted
        compiled_module.Planned.run = lambda planned, *args: self(planned, *args)  # type: ignore[method-assign]

    def __call__(self, planned: Any, stream: int, grid: int, sizes: Any, tensors: Any) -> None:
        kernel, kwargs = planned.kernel, planned.options
        call = (kernel, grid, (*tensors, *sizes), kwargs)
        self.stub.library.stub_expect(0, None)
        compiled = self.triton(*call)
        self.stub.expect(compiled.src.signature)
        self.triton(*call)
        want = self.stub.last()
        self.original(planned, stream, grid, sizes, tensors)
        first = self.stub.last()
        through, launches = self.through, self.stub.launches()
        self.original(planned, stream, grid, sizes, tensors)
        direct = self.stub.last()
        self.seen += 1
        if "num_ctas" in kwargs:
            self.clusters.append([grid, direct["grid_x"], direct["cluster"]])
        if self.through != through:
            self.wrong.append([kernel.__name__, "the second call went through Triton"])
        if self.stub.launches() != launches + 1:
            self.wrong.append([kernel.__name__, "not one launch"])
        if not want == first == direct or direct["stream"] != self.stub.stream():
            self.wrong.append([kernel.__name__, want, first, direct])


def _operations(few: bool) -> None:
    """Calls of every launcher whose arguments specialise differently, each on tensors that another call had nearly."""
    import torch

    from fused_ops.ops.norm.layer_norm_launch import layer_norm_bwd_launch, layer_norm_launch
    from fused_ops.ops.softmax.softmax_launch import softmax_bwd_launch, softmax_launch

    for dtype in (torch.bfloat16,) if few else (torch.float32, torch.bfloat16):
        flat = torch.randn(40000).to(dtype)
        for offset in (0, 1):  # the same shapes at an address that is a multiple of 16 and at one that is not
            for M, N in ((16, 64),) if few else ((16, 64), (1, 64), (3, 1)):
                x = flat[offset : offset + M * N].view(M, N)
                y = softmax_launch(x, 1, None)
                softmax_bwd_launch(x, y, 1, dtype)
                w = flat[offset : offset + N]
                for weight, bias in ((w, w.float()), (w.float(), w), (w, None), (None, None)):
                    _, mean, rstd = layer_norm_launch(x, weight, bias, 1e-5)
                    layer_norm_bwd_launch(x, x, weight, mean, rstd, True, weight is not None, bias is not None, None)
        x = flat[: 16 * 64].view(16, 64)
        softmax_launch(x[:, ::2], 1, None)
        softmax_launch(x.t(), 1, None)
        softmax_launch(x.view(4, 4, 64), 1, None)
        softmax_launch(x, 1, torch.float32)
        for eps in (0.0, 1) if few else (0.0, 1.0, 1, 0, 16):
            layer_norm_launch(x[::2], None, None, eps)
        for i, j, k in itertools.product((0, 1), repeat=3):  # one plan, and other tensors each time at multiples of 16
            layer_norm_launch(flat[i : i + 1024].view(16, 64), flat[j : j + 64], flat[k : k + 64], 1e-5)


def _clusters(few: bool) -> None:
    """Calls of the launchers with rows of clusters, forced."""
    import torch

    from fused_ops._runtime import tables
    from fused_ops._runtime.tuned_kernels import KERNELS
    from fused_ops.kernels.config import RowConfig
    from fused_ops.ops.norm.layer_norm_launch import layer_norm_launch
    from fused_ops.ops.softmax.softmax_launch import softmax_bwd_launch, softmax_launch

    for variant in ("one_pass",) if few else ("one_pass", "packed"):
        for num_ctas in (2,) if few else (2, 4, 8):
            for kernel in ("softmax_fwd", "softmax_bwd"):
                tables.force(kernel, RowConfig(1, 1024, 1, variant, num_ctas=num_ctas))
            tables.force("layer_norm_fwd", RowConfig(1, 1024, 1, num_ctas=num_ctas))
            for N in (1024, 1001):
                x = torch.randn(3, N).to(torch.bfloat16)
                layer_norm_launch(x, x[0], None, 1e-5)
                softmax_bwd_launch(x, softmax_launch(x, 1, None), 1, x.dtype)
    for kernel in KERNELS:
        tables.force(kernel, None)


def check(few: bool) -> dict[str, Any]:
    """What the direct path does otherwise than kernel[grid]: an empty list everywhere, and how much was compared."""
    import torch
    import triton

    from fused_ops._runtime import compiled as compiled_module
    from fused_ops._runtime.clusters import can_cluster
    from fused_ops._runtime.launch import launch_grid
    from fused_ops.kernels.reduce import column_sum_kernel

    stub = Stub()
    compare = Compare(stub)
    _operations(few)
    clusters = can_cluster(0)
    if clusters:
        _clusters(few)
    result: dict[str, Any] = {"triton": triton.__version__, "wrong": compare.wrong}
    result["clusters"] = [clusters, compare.clusters]

    part, out = torch.ones(4, 64), torch.empty(64)
    plans: dict[Any, Any] = {}

    def call(part: Any = part, P: int = 4, stride: int = 64) -> dict[str, Any]:
        key = stub.device(), stride
        if key not in plans:
            plans[key] = compiled_module.Planned(stub.device(), column_sum_kernel, {**KEYWORDS, "stride_pp": stride})
        launch_grid(plans[key], 2, (P,), part, out, out)
        return stub.last()

    zero = call()
    call(P=1), call(stride=2**31), call(P=2**31 - 1), call(stride=2**31 + 16)  # a constant, and 64 bits
    stub.current.device, stub.current.stream = 1, 77
    _operations(few)
    one = call()
    result["compared"] = compare.seen
    result["device"] = [zero["function"] != one["function"], one["stream"] == 77]
    stub.current.device, stub.current.stream = 0, 0

    compiled_module.Planned.run = compare.original  # type: ignore[method-assign]
    launches: list[int] = []

    def in_thread(number: int) -> None:
        stub.current.stream = number
        for _ in range(200):
            plans[0, 64].run(number, 2, (4,), (part, out, out))
        launches.append(number)

    before = stub.launches()
    threads = [threading.Thread(target=in_thread, args=(n,)) for n in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    result["threads"] = [sorted(launches), stub.launches() - before]

    hooked: list[int] = []

    def hook(_: Any) -> None:
        hooked.append(1)

    call()
    triton.knobs.runtime.launch_enter_hook.add(hook)
    call()
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    call()
    result["hooked"] = len(hooked)

    def unknown(*_: Any) -> None:
        raise TypeError("function takes other arguments")

    before = stub.launches()
    for planned in plans.values():
        planned._ready = dict.fromkeys(planned._ready, unknown)
    fallen = call()
    result["fallback"] = [stub.launches() - before, fallen == zero]

    compiled_module.SPECIALISATIONS = 4
    plan, flat = compiled_module.Planned(0, column_sum_kernel, KEYWORDS), torch.zeros(400)
    for offsets in itertools.product(range(4), repeat=2):
        plan.run(0, 2, (4,), (flat[offsets[0] :], flat[offsets[1] :], out))
    result["specialisations"] = len(plan._ready)
    return result


KEYWORDS = {"N": 64, "stride_pp": 64, "BLOCK_P": 64, "BLOCK_N": 32}


def _ways() -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[[], Any]]]:
    """Ways to run a planned launch, and calls that make one: layer norm of 4 x 64 floats."""
    import torch
    import torch.nn.functional as F
    from triton.runtime import driver

    from fused_ops import fused_layernorm
    from fused_ops._runtime import compiled as compiled_module
    from fused_ops._runtime import launch as launch_module
    from fused_ops._runtime import scratch as scratch_module
    from fused_ops.ops.linear import linear_launch as linear_launch_module
    from fused_ops.ops.norm import layer_norm_launch as layer_norm_launch_module

    Stub()
    # int() is 0, the device and the stream, and like torch's own functions for them it is written in C.
    torch.Tensor.get_device = launch_module._current_device = launch_module._current_stream = int  # type: ignore[assignment, method-assign]
    driver.active.get_current_device = driver.active.get_current_stream = int  # type: ignore[assignment]
    compiled_module.scratch = lambda size, _: torch.empty((size,), dtype=torch.int8)  # type: ignore[assignment]
    scratch_module.allocator = lambda size, *_: torch.empty((size,), dtype=torch.int8)  # type: ignore[assignment]
    x, w, b, mean, rstd = torch.randn(4, 64), torch.randn(64), torch.randn(64), torch.randn(4), torch.randn(4)
    x16, w16 = torch.randn(128, 64).half(), torch.randn(128, 64).half()
    torch.Tensor.is_cpu, torch.Tensor.is_cuda = False, True  # type: ignore[assignment, misc]  # the fast path of a GPU
    runs = {
        "direct": compiled_module.Planned.run,
        "kernel[grid]": lambda planned, _, *launch: planned.through_triton(*launch),
        "without a launch": lambda *_: None,
    }
    calls = {
        "launcher": lambda: layer_norm_launch_module.layer_norm_launch(x, w, b, 1e-5),
        "public": lambda: fused_layernorm(x, (64,), w, b),
        "linear": lambda: linear_launch_module.linear_launch(x16, w16, None, "gelu", False),
        "backward": lambda: layer_norm_launch_module.layer_norm_bwd_launch(x, x, w, mean, rstd, True, True, True, None),
        "aten_cpu": lambda: F.layer_norm(x, (64,), w, b),
    }
    return runs, calls


def count() -> dict[str, list[int]]:
    """How many calls of Python functions, and of functions in Python and C together, a warm call makes by each way."""
    import gc

    import torch

    from fused_ops._runtime import compiled as compiled_module

    counts: dict[str, list[int]] = {}
    runs, calls = _ways()
    events: list[str] = []
    gc.disable()  # what a collection calls is nobody's cost here
    with torch.no_grad():
        for run, call in itertools.product(runs, ("launcher", "public")):
            compiled_module.Planned.run = runs[run]  # type: ignore[method-assign]
            function = calls[call]
            function(), function()
            events.clear()
            sys.setprofile(lambda _, event, __: events.append(event))
            function()
            sys.setprofile(None)
            python = events.count("call")
            counts[f"{run} {call}"] = [python, python + events.count("c_call") - 1]  # setprofile's own
    return counts


def measure() -> dict[str, float]:
    """Host microseconds a call by each way, the least of alternating rounds."""
    import torch

    from fused_ops._runtime import compiled as compiled_module

    runs, calls = _ways()
    times: dict[str, float] = {}
    with torch.no_grad():
        for _ in range(20):
            for run, call in itertools.product(runs, calls):
                compiled_module.Planned.run = runs[run]  # type: ignore[method-assign]
                function = calls[call]
                start = time.perf_counter()
                for _ in range(500):
                    function()
                took = (time.perf_counter() - start) / 500 * 1e6
                name = call if call == "aten_cpu" else f"{run} {call}"
                times[name] = min(took, times.get(name, took))
    return {name: round(time, 2) for name, time in times.items()}


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(sys.argv[2])
    else:
        few = "few" in sys.argv[2:]
        print(json.dumps({"check": lambda: check(few), "count": count, "time": measure}[sys.argv[1]]()))
