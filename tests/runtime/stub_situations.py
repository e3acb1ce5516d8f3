"""Situations on the libcuda that only records (stub_driver.py): refused launches, unloaded kernels, scratch memory.

python -m tests.runtime.stub_situations faults     print what a refused launch says, and what unloading does, as JSON
python -m tests.runtime.stub_situations scratch    print what memory kernels with descriptors are given, as JSON
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from typing import Any

import torch
import triton

from tests.runtime.stub_driver import KEYWORDS, Stub

INVALID_VALUE, ILLEGAL_ADDRESS = 1, 700  # CUresult


def faults() -> dict[str, Any]:
    """What the first launch and a direct one say of a driver that refuses them, and what unloading a kernel does."""
    from fused_ops._runtime import compiled as compiled_module
    from fused_ops.kernels.reduce import column_sum_kernel

    stub = Stub()
    result: dict[str, Any] = {"triton": triton.__version__}
    tensors = (torch.ones(4, 64), torch.empty(64), torch.empty(64))
    plans = [compiled_module.Planned(0, column_sum_kernel, KEYWORDS)]

    def call() -> str:
        try:
            plans[0].run(0, 2, (4,), tensors)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    stub.library.stub_refuse(INVALID_VALUE)
    result["first"] = call()
    stub.library.stub_refuse(0)
    result["after"] = [call(), stub.launches()]
    stub.library.stub_refuse(INVALID_VALUE)
    result["direct"] = call()
    stub.library.stub_refuse(ILLEGAL_ADDRESS)
    result["late"] = call()
    stub.library.stub_refuse(0)

    through: list[int] = []
    original = compiled_module._through_triton
    compiled_module._through_triton = lambda *args: (through.append(1), original(*args))[1]
    launches, unloaded = stub.launches(), stub.unloaded()
    column_sum_kernel.device_caches.clear()
    gc.collect()
    said = call()
    result["cleared"] = [said, stub.launches() - launches, len(through), stub.unloaded() - unloaded]
    plans[0] = compiled_module.Planned(0, column_sum_kernel, KEYWORDS)
    gc.collect()
    result["let go"] = stub.unloaded() - unloaded
    result["again"] = [call(), len(through)]
    return result


def scratch() -> dict[str, Any]:
    """What kernels that make descriptors ask of the allocator, by kernel[grid] and directly, and what is kept of it."""
    from fused_ops._runtime import compiled as compiled_module
    from fused_ops._runtime import scratch as scratch_module
    from fused_ops.kernels.linear import linear_config
    from fused_ops.ops.linear.matmul import matmul, matmul_dact
    from fused_ops.ops.linear.matmul_plan import forced_config

    stub = Stub()
    given: list[Any] = []  # (weak reference, address, bytes) of each buffer
    empty, alive = torch.empty, lambda: sum(buffer() is not None for buffer, *_ in given)
    compiled, slow = None, 0

    def pool(*size: Any, device: Any = None, dtype: Any = None) -> Any:
        buffer = empty(*size, dtype=dtype)
        if dtype is torch.int8:
            given.append((weakref.ref(buffer), buffer.data_ptr(), buffer.numel()))
        return buffer

    torch.cuda.current_device = stub.device
    scratch_module.torch = type("torch", (), {"empty": staticmethod(pool), "int8": torch.int8, "cuda": torch.cuda})  # type: ignore[attr-defined]
    through = compiled_module._through_triton

    def seen(*args: Any) -> Any:
        nonlocal compiled, slow
        compiled, slow = through(*args), slow + 1
        return compiled

    compiled_module._through_triton = seen
    x, w, dy = torch.randn(300, 256).half(), torch.randn(264, 256).half(), torch.randn(300, 264).half()
    y, pre, dpre = torch.empty(300, 264).half(), torch.empty(300, 264).half(), torch.empty(300, 256).half()
    calls = {
        "fwd": lambda: matmul(x, w, None, y, pre, "gelu", True),
        "dact": lambda: matmul_dact(dy, w, x, dpre, "gelu", True),
    }
    result: dict[str, Any] = {"triton": triton.__version__}
    for use, call in calls.items():
        with forced_config(linear_config._TMA_TILES[use][0][0]):
            at_launch = []
            for _ in range(3):  # the first by kernel[grid], the others directly
                before = len(given)
                stub.library.stub_expect(0, None)
                if compiled is not None:
                    stub.expect(compiled.src.signature)
                call()
                gc.collect()
                last = stub.last()
                size = compiled.metadata.global_scratch_size
                got = last["values"][-2] if last["values"] else given[-1][1]
                # buffers given, of the right size, to the kernel, and how many are still there
                at_launch.append([len(given) - before, given[-1][2] == size * last["grid_x"], got == given[-1][1], alive()])
            result[use] = [slow, at_launch]
            compiled, slow = None, 0
    return result


if __name__ == "__main__":
    print(json.dumps({"faults": faults, "scratch": scratch}[sys.argv[1]]()))
