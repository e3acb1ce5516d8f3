"""Interpreted kernels from many threads: Triton's interpreter changes triton.language while a kernel runs, so one runs at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fused_ops import REGISTRY
from tests.contract import leaves


def test_every_op_from_nine_threads() -> None:
    """Each thread calls three ops, forward and backward, beginning with another one; all get the bits of one thread alone."""

    def run(name: str) -> list[Tensor]:
        op = REGISTRY[name]
        sample = op.example("cpu", torch.float32)
        args, wanted = leaves(sample.args) if op.trains else (sample.args, [])
        out = op.public(*args, **sample.kwargs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        gradients: tuple[Any, ...] = torch.autograd.grad(outs[0].sum(), wanted) if wanted else ()
        return [*outs, *gradients]

    names = list(REGISTRY)
    expected = {name: run(name) for name in names}
    together = threading.Barrier(9)

    def work(first: int) -> int:
        together.wait()
        right = 0
        for name in (names * 3)[first : first + 3]:
            got = run(name)
            right += all(torch.equal(a.float(), b.float()) for a, b in zip(got, expected[name], strict=True))
        return right

    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(work, range(9))) == [3] * 9
