"""What `fused-ops tune` runs on a GPU: one launcher with one configuration, checked against the contract, then timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._runtime import tables
from .._torch.spec import REGISTRY
from ..kernels.config import RowConfig, next_power_of_2
from ..testing import assert_within_contract

DTYPES = {2: torch.bfloat16, 4: torch.float32}
CHECKED_ROWS = 24


def all_keys() -> list[tables.Key]:
    """The keys of every benchmark shape, for 2 and 4 bytes an element."""
    shapes: dict[str, set[tuple[int, int]]] = {kernel: set() for kernel in tables.KERNELS}
    for op in ("softmax", "layer_norm"):
        for case in REGISTRY[op].bench.cases():
            M, N = case.shape
            for kernel in (f"{op}_fwd", f"{op}_bwd"):
                shapes[kernel].add((next_power_of_2(M), N))
    return [tables.Key(kernel, M, N, itemsize) for kernel in shapes for M, N in sorted(shapes[kernel]) for itemsize in DTYPES]


def arguments(key: tables.Key, device: str, rows: int | None = None) -> tuple[Any, ...]:
    """The raw operator's arguments for key, or for fewer rows."""
    dtype = DTYPES[key.itemsize]
    shape = (key.M if rows is None else min(key.M, rows), key.N)
    x = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
    if key.kernel == "softmax_fwd":
        return x, 1, None
    if key.kernel == "softmax_bwd":
        return torch.randn(shape, device=device).to(dtype), torch.softmax(x, 1), 1, dtype
    w, b = torch.randn(2, key.N, device=device).to(dtype)
    if key.kernel == "layer_norm_fwd":
        return x, w, b, 1e-5
    variance, mean = torch.var_mean(x.float(), 1, correction=0)
    return x.flip(0), x, w, mean, torch.rsqrt(variance + 1e-5), True, True, True, dtype


def measure(
    key: tables.Key, config: RowConfig, device: str = "cuda", timer: Callable[[Callable[[], Any]], float] | None = None
) -> float:
    """Microseconds of one call of key's launcher with config, its L2 cache cold. AssertionError where it is wrong."""
    spec = REGISTRY[key.kernel[:-4]]
    forward = key.kernel.endswith("fwd")
    launch, bound = (spec.launch, spec.bound) if forward else (spec.backward.launch, spec.backward.bound)
    tables.force(key.kernel, config)
    try:
        few = arguments(key, device, CHECKED_ROWS)
        outputs = launch(*few)
        for out, expected in zip(outputs if isinstance(outputs, tuple) else (outputs,), bound(*few)):
            if expected is not None:
                assert_within_contract(out, expected, f"{key.kernel} {config}")
        args = arguments(key, device)
        return (timer or _milliseconds)(lambda: launch(*args)) * 1000.0
    finally:
        tables.force(key.kernel, None)


def _milliseconds(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=10, rep=50, return_mode="median"))
