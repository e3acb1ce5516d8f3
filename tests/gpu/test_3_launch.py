"""The launch path where only a GPU can show it: both ways of launching, other threads, several streams at once, and
torch.compile's CUDA graphs around kernels that take scratch memory for their TMA descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops
from fused_ops import REGISTRY
from fused_ops.testing import recorded
from tests.contract import TRAINED

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
NAMES = list(TRAINED)


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(BF16)


def leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def step(name: str, args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Forward and backward of an op: its output and its gradients."""
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out = REGISTRY[name].public(*args, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))]


def large() -> dict[str, tuple[Any, ...]]:
    """Arguments of every op that trains, which choose TMA descriptors for its products, or packed rows and a chunked backward."""
    sizes = {2: (300, 16384), 3: (1024, 1536, 512)}
    made = {}
    for name, op in TRAINED.items():
        shape = next(iter(op.bench.shapes.values()))
        variant = next((v for v in op.bench.variants if v is not None), None)
        made[name], kwargs = op.bench.make("cuda", sizes.get(len(shape), shape), BF16, variant)
        assert set(kwargs) <= {"dim"}  # -1, every op's own default
    return made


@pytest.mark.parametrize("name", [name for name, op in TRAINED.items() if op.roles.multiplies])
def test_these_sizes_take_descriptors(name: str) -> None:
    """What the tests below are about, on a GPU that has TMA."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9")
    with recorded() as launches, torch.no_grad():
        REGISTRY[name].public(*large()[name])
    assert any("tma" in kernel.fn.__name__ for kernel, *_ in launches)


@pytest.mark.seconds(120)
def test_reduce_overhead() -> None:
    """torch.compile(mode="reduce-overhead") over products by TMA, forward and backward, on new numbers each time: nothing of
    ours stays in the memory of its CUDA graphs."""
    from torch._dynamo.utils import counters

    M, N, K = 1024, 1536, 512
    weights = [randn(N, K, scale=K**-0.5), randn(K, N, scale=N**-0.5), randn(N, K, scale=K**-0.5), randn(N, K, scale=K**-0.5)]
    x, *weights = map(leaf, (randn(M, K), *weights))

    def function(x: Tensor, w: Tensor, back: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        y = fused_ops.fused_linear(x, w, None, "gelu")
        y = fused_ops.fused_mlp(y.sin(), back, None, w, None, "silu")
        return fused_ops.fused_linear(y, back, None, "relu") + fused_ops.fused_gated_linear(x, gate, up)[:, :K]

    counters.clear()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(x, *weights)
        dy = torch.randn_like(out)
        got = [t.clone() for t in (out.detach(), *torch.autograd.grad(out, (x, *weights), dy))]
        expected = function(x, *weights)
        exact = [expected.detach(), *torch.autograd.grad(expected, (x, *weights), dy)]
        for g, e in zip(got, exact):
            torch.testing.assert_close(g.float(), e.float(), rtol=3e-2, atol=3e-2 * e.float().abs().max().item())
    assert counters["inductor"]["cudagraph_skips"] == 0


SAME_BITS = """
import hashlib, sys, torch
from fused_ops._runtime.launch_path import launch_path
from tests.contract import TRAINED
from tests.gpu.hold import on_gpu
from tests.gpu.test_3_launch import large, leaf, step
print(launch_path()[0])
for name, spec in TRAINED.items():
    samples = [s for s in spec.samples("cpu", torch.bfloat16) if s.args[0].numel()][:3]
    calls = [([leaf(on_gpu(a)) for a in s.args], s.kwargs) for s in samples]
    torch.manual_seed(1)
    calls.append(([leaf(a) for a in large()[name]], {}))
    for args, kwargs in calls:
        for _ in range(3):  # the first launch of its kind goes through kernel[grid] in any case
            results = step(name, args, kwargs)
        torch.cuda.synchronize()
        bits = [r.contiguous().view(torch.uint8).cpu().numpy().tobytes() for r in results]
        print(name, hashlib.sha256(b"".join(bits)).hexdigest())
"""


@pytest.mark.seconds(120)
def test_both_ways_of_launching_give_the_same_bits() -> None:
    processes = []
    for way in ("auto", "triton"):
        environment = {**os.environ, "FUSED_OPS_LAUNCH": way, "PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SAME_BITS], env=environment, text=True, cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=110) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [err[-2000:] for _, err in said]
    (way, *bits), (other_way, *other_bits) = (out.splitlines() for out, _ in said)
    assert (way, other_way) == ("fast path", "kernel[grid]")
    assert len(bits) == 4 * len(NAMES)
    assert bits == other_bits


def in_thread(function: Callable[[], Any]) -> Any:
    """function() in a thread that has never used CUDA."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("name", NAMES)
def test_a_new_thread(name: str) -> None:
    """The first thing that a thread does with CUDA is a launch of ours, into memory that the pool already has."""
    args = [leaf(a) for a in large()[name]]
    expected = step(name, args, {})
    torch.cuda.synchronize()
    for _ in range(2):
        got = in_thread(lambda: step(name, args, {}))
        torch.cuda.synchronize()
        for g, e in zip(got, expected):
            torch.testing.assert_close(g, e, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_backward_in_a_new_thread(name: str) -> None:
    args = [leaf(a) for a in large()[name]]
    wanted = [a for a in args if isinstance(a, Tensor)]
    expected = step(name, args, {})[1:]
    out = REGISTRY[name].public(*args)
    got = in_thread(lambda: torch.autograd.grad(out, wanted, torch.ones_like(out)))
    torch.cuda.synchronize()
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [False, True], ids=["one_thread", "two_threads"])
def test_two_streams_at_once(threads: bool) -> None:
    """Two streams run every op on numbers of their own, again and again without waiting: none writes into the other's
    scratch memory, partial sums or descriptors."""
    torch.manual_seed(2)
    sides = [{name: [leaf(a) for a in args] for name, args in large().items()} for _ in range(2)]
    for arguments in sides:
        arguments["linear_small"] = [leaf(a) for a in (randn(16, 4096), randn(4096, 4096, scale=1 / 64), None, "silu")]
    streams = [torch.cuda.Stream() for _ in sides]

    def every(arguments: dict[str, list[Any]]) -> list[Tensor]:
        return [t for name, args in arguments.items() for t in step(name.removesuffix("_small"), args, {})]

    expected = [every(arguments) for arguments in sides]
    torch.cuda.synchronize()

    def body(side: int) -> list[list[Tensor]]:
        with torch.cuda.stream(streams[side]):
            torch.cuda._sleep(2_000_000)  # so that both have work queued
            return [every(sides[side]) for _ in range(4)]

    if threads:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(body, range(2)))
    else:
        results = [body(side) for side in range(2)]
    torch.cuda.synchronize()
    for side, rounds in enumerate(results):
        for got in rounds:
            for g, e in zip(got, expected[side]):
                torch.testing.assert_close(g, e, rtol=0, atol=0)


def test_a_graph_outlives_other_calls() -> None:
    """A captured product is replayed after many others have taken scratch memory of their own."""
    x, w, b = randn(1024, 512), randn(1536, 512, scale=512**-0.5), randn(1536)
    for _ in range(3):
        fused_ops.fused_linear(x, w, b, "gelu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_ops.fused_linear(x, w, b, "gelu")
    for i in range(8):
        fused_ops.fused_linear(randn(64 * (i + 1), 512), w, b, "gelu")
        torch.cuda.empty_cache()
    x.copy_(randn(1024, 512))
    graph.replay()
    torch.cuda.synchronize()
    exact = F.gelu(F.linear(x.double(), w.double(), b.double()))
    assert ((y.double() - exact).abs() <= 0.01 * exact.abs() + 0.02).all()
    torch.testing.assert_close(y, fused_ops.fused_linear(x, w, b, "gelu"), rtol=0, atol=0)
