"""Kernels precompiled by one process and launched by another, on a libcuda that only records. Run as a program:

python -m tests.bench.precompiled WORD...    do what each word says in a fork of its own, and print a line of JSON for each

compile     precompile what the calls launch: what came of it
run         make the calls through Triton's own driver and launcher: what Triton found in its cache
few-compile, few-run    the same for a few of the calls
sorted, reversed        the cache key of every kernel, asked for in the order of the names or in the other
0123, 3210, ...         the same, those of the kernels in FIRST asked for before all others, in this order

compile and run need the stub of tests/runtime/stub_driver.py. CPU tensors pass for tensors of GPU 0. What a fork starts from
has imported everything and asked for nothing.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ops._tools.launches import Gpu, Launcher
from fused_ops._tools.precompile import Call, _imports, precompile

FIRST = ("linear_act_bwd_kernel", "linear_fwd_tma_kernel", "linear_reduce_kernel", "gate_bwd_kernel")
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


def calls(few: bool = False) -> list[Call]:
    """Both ways into a launch, both alignments, statistics or none, TMA, and K in parts. few: no statistics and no parts."""
    return [
        *(Call(f"softmax {o}", functools.partial(_softmax, o, o > 0), dispatched=o > 0) for o in (0, 1)),
        *(Call(f"layer_norm {N}", functools.partial(_layer_norm, N)) for N in (() if few else (64, 197))),
        *(Call(f"linear {M}", functools.partial(_linear, M)) for M in ((128,) if few else (128, 3))),
    ]


def run(few: bool) -> dict[str, Any]:
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
    for call in reversed(calls(few)):  # in another order: no key may depend on it
        eager._modes = modes if call.dispatched else lambda: 0
        with torch.autograd.set_multithreading_enabled(False), Launcher():
            call.run()
    new = sorted(path.name for path in set(Path(triton_cache()).rglob("*")) - before)
    return {"hits": sum(hits), "misses": len(hits) - sum(hits), "new": new}


def keys(order: str) -> dict[str, str]:
    """The cache key of every kernel, settled and asked for in this order."""
    import importlib
    import pkgutil

    from fused_ops import kernels
    from fused_ops._runtime.cache_keys import settle

    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "fused_ops.kernels.")]
    found = {name: value for module in modules for name, value in vars(module).items() if hasattr(type(value), "cache_key")}
    first = [FIRST[int(digit)] for digit in order if digit.isdigit()]
    for name in [*first, *sorted(found, reverse=order == "reversed")]:
        settle(found[name])
    return {name: found[name].cache_key for name in sorted(found)}


def said(word: str) -> dict[str, Any]:
    """What a word of the command line asks for."""
    few, name = word.startswith("few-"), word.removeprefix("few-")
    if name == "compile":
        return vars(precompile(calls(few), GPU, processes=2))
    return run(few) if name == "run" else keys(word)


def main() -> None:
    _imports()
    for word in sys.argv[1:]:
        sys.stdout.flush()
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                sys.exit(f"{word}: failed")
            continue
        try:
            print(json.dumps(said(word)), flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    main()
