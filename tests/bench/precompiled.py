"""Kernels precompiled by one process and launched by another, on a libcuda that only records. Run as a program:

python -m tests.bench.precompiled compile    precompile what the calls launch, and print what came of it as JSON
python -m tests.bench.precompiled run        make the calls through Triton's own driver and launcher, and print what Triton
                                             found in its cache, as JSON

python -m tests.bench.precompiled keys [reversed]    print the cache key of every kernel, asked for in one order or the other

The first two need the stub of tests/runtime/stub_driver.py. CPU tensors pass for tensors of GPU 0.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ops._tools.launches import Gpu, Launcher
from fused_ops._tools.precompile import Call, precompile

GPU = Gpu("Test", (9, 0), 132)  # the stub's device


def _rows(M: int, N: int, offset: int = 0) -> Tensor:
    return torch.randn(M * N + offset).to(torch.bfloat16)[offset:].view(M, N)


def _softmax(offset: int, dispatched: bool) -> None:
    from fused_ops import fused_softmax

    x = _rows(32, 256, offset)
    if not dispatched:
        fused_softmax(x, -1)
    x = x.requires_grad_()
    y = fused_softmax(x, -1)
    torch.autograd.grad(y, x, torch.ones_like(y))


def _layer_norm(N: int) -> None:
    from fused_ops import fused_layernorm

    x, (w, b) = _rows(3, N), _rows(2, N)
    fused_layernorm(x, (N,), w, b)
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = fused_layernorm(leaves[0], (N,), *leaves[1:])
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def _linear(M: int) -> None:
    from fused_ops import fused_linear

    leaves = [t.requires_grad_() for t in (_rows(M, 512), _rows(64, 512), _rows(1, 64)[0].clone())]
    with torch.no_grad():
        fused_linear(*leaves, "gelu")
    y = fused_linear(*leaves, "gelu")
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def calls() -> list[Call]:
    """Both ways into a launch, both alignments, statistics or none, TMA, and K in parts."""
    return [
        *(Call(f"softmax {o}", functools.partial(_softmax, o, o > 0), dispatched=o > 0) for o in (0, 1)),
        *(Call(f"layer_norm {N}", functools.partial(_layer_norm, N)) for N in (64, 197)),
        *(Call(f"linear {M}", functools.partial(_linear, M)) for M in (128, 3)),
    ]


def run() -> dict[str, Any]:
    """What Triton looked up, and what it wrote to its cache."""
    import triton

    from fused_ops._runtime.settings import triton_cache
    from fused_ops._torch import eager
    from tests.runtime.stub_driver import Stub

    Stub()
    torch.Tensor.is_cpu, torch.Tensor.is_cuda = False, True  # type: ignore[assignment, misc]
    triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8))
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    modes = eager._modes
    before = set(Path(triton_cache()).rglob("*"))
    for call in reversed(calls()):  # in another order: no key may depend on it
        eager._modes = modes if call.dispatched else lambda: 0
        with torch.autograd.set_multithreading_enabled(False), Launcher():
            call.run()
    new = sorted(path.name for path in set(Path(triton_cache()).rglob("*")) - before)
    return {"hits": sum(hits), "misses": len(hits) - sum(hits), "new": new}


def keys(reverse: bool) -> dict[str, str]:
    """The cache key of every kernel, settled and asked for in the order of the names, or in the reverse order."""
    import importlib
    import pkgutil

    from fused_ops import kernels
    from fused_ops._runtime.cache_keys import settle

    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "fused_ops.kernels.")]
    found = {name: value for module in modules for name, value in vars(module).items() if hasattr(type(value), "cache_key")}
    for name in sorted(found, reverse=reverse):
        settle(found[name])
    return {name: found[name].cache_key for name in sorted(found)}


def main() -> None:
    if sys.argv[1] == "run":
        print(json.dumps(run()))
    elif sys.argv[1] == "keys":
        print(json.dumps(keys("reversed" in sys.argv)))
    else:
        outcome = precompile(calls(), GPU, processes=2)
        print(json.dumps(vars(outcome)))


if __name__ == "__main__":
    main()
