"""Host time of a call: what Python, the dispatcher and autograd cost, on tensors so small that nothing else shows.

The same ATen body stands behind each mechanism on a CPU, so that the difference is the mechanism; the time is the calling
thread's CPU time, which other processes on the machine do not lengthen. On a GPU it is wall time until the launch
returns, in bf16, with Liger beside it where that is installed. A backward is not in it: it runs in the autograd engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops import REGISTRY

from .failure import first_line
from .providers import Unsupported, Workload, by_name
from .record import Recorder, spread
from .tasks import dtype_name
from .timing import spin, synchronize

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
CLOSE = 2e-2 if ON_GPU else 1e-3
M, N = 4, 64
ROUNDS, CALLS, WARMUP_ROUNDS = (20, 100, 2) if ON_GPU else (40, 200, 5)
TIMER = time.perf_counter if ON_GPU else time.thread_time
PAIR_CALLS, PAIR_ROUNDS = (100, 20) if ON_GPU else (150, 60)
PAIR_M = 8
MECHANISMS = ("eager", "autograd.Function", "custom_op", "ours", *(("liger",) if ON_GPU else ()))


def _eager(op: str) -> Callable[..., Tensor]:
    if op == "softmax":
        return lambda x: F.softmax(x, -1)
    if op == "layer_norm":
        return lambda x, w, b: F.layer_norm(x, (N,), w, b)
    return lambda x, w, b: F.relu(F.linear(x, w, b))


def _ours(op: str) -> Callable[..., Tensor]:
    import fused_ops

    if op == "softmax":
        return lambda x: fused_ops.fused_softmax(x, -1)
    if op == "layer_norm":
        return lambda x, w, b: fused_ops.fused_layernorm(x, (N,), w, b)
    return lambda x, w, b: fused_ops.fused_linear(x, w, b, "relu")


def _function(op: str) -> Callable[..., Tensor]:
    """The eager call inside a torch.autograd.Function in ctx style. Its backward is never run."""
    eager = _eager(op)

    class Wrapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Tensor) -> Tensor:
            ctx.save_for_backward(*args)
            return eager(*args)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            raise NotImplementedError

    return Wrapped.apply


def _custom_op(op: str) -> Callable[..., Tensor]:
    """The eager call behind torch.library.custom_op, with an autograd formula registered as its documentation shows."""
    eager = _eager(op)

    def one(x: Tensor) -> Tensor:
        return eager(x)

    def three(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return eager(x, w, b)

    made = torch.library.custom_op(f"fused_ops_bench::{op}", one if op == "softmax" else three, mutates_args=())
    made.register_autograd(lambda ctx, dy: None, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return made


def _liger(op: str) -> Callable[..., Tensor]:
    """Liger's public function.

    Raises:
        Unsupported: it is not installed, or has no such op.
    """
    provider = by_name("liger")
    if reason := provider.available(DEVICE):
        raise Unsupported(reason)
    spec = REGISTRY[op]
    call = provider.prepare(Workload(spec, next(iter(spec.bench.cases())), "fwd", (), {}, DEVICE)).call
    return {"softmax": lambda x: call(x, -1), "layer_norm": lambda x, w, b: call(x, (N,), w, b)}[op]


_CALLS: dict[tuple[str, str], Callable[..., Tensor]] = {}


def _call(op: str, mechanism: str) -> Callable[..., Tensor]:
    make = {
        "eager": _eager, "autograd.Function": _function, "custom_op": _custom_op, "ours": _ours, "liger": _liger,
    }[mechanism]  # fmt: skip
    if (op, mechanism) not in _CALLS:
        _CALLS[op, mechanism] = make(op)
    return _CALLS[op, mechanism]


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("op", ["softmax", "layer_norm", "linear"])
def test_host(op: str, grad: bool, mechanism: str, benchmark: Any, recorder: Recorder) -> None:
    names = {"op": op, "case": f"{M}x{N}", "dtype": dtype_name(DTYPE), "kind": "host", "provider": mechanism, "shape": f"{M}x{N}",
             "role": "ours" if mechanism == "ours" else "peer", "pass": "train_fwd" if grad else "fwd"}  # fmt: skip
    args = _tensors(op, M, grad, parameters_too=False)
    try:
        call = _call(op, mechanism)
        out = call(*args)
    except Unsupported as reason:
        recorder.add(**names, status="unsupported", reason=str(reason))
        pytest.skip(str(reason))
    except Exception as error:
        recorder.add(**names, status="error", reason=first_line(error))
        if mechanism == "liger":
            pytest.skip(f"liger failed: {first_line(error)}")
        raise
    torch.testing.assert_close(out, _eager(op)(*args), rtol=CLOSE, atol=CLOSE)
    assert out.requires_grad is grad
    benchmark.group = f"host-{op}-{'grad' if grad else 'no_grad'}"
    with torch.set_grad_enabled(grad):
        spin()
        benchmark.pedantic(
            call, args, rounds=ROUNDS, iterations=CALLS, warmup_rounds=WARMUP_ROUNDS,
            teardown=lambda *_: synchronize(DEVICE),
        )  # fmt: skip
    if benchmark.stats is None:  # --benchmark-disable
        return
    recorder.add(
        **names, configuration=f"{DEVICE}; {TIMER.__name__}; {CALLS} calls a sample", status="ok", method="loop",
        **spread(benchmark.stats.stats.data),
    )  # fmt: skip


def _tensors(op: str, rows: int, grad: bool, parameters_too: bool) -> list[Tensor]:
    """Input of rows rows and parameters of softmax, layer_norm, linear or linear_gelu; grad: the input's, or all's."""
    shapes = {"softmax": [], "layer_norm": [(N,), (N,)], "linear": [(N, N), (N,)], "linear_gelu": [(N, N), (N,)]}[op]
    made = [torch.randn(*shape, device=DEVICE, dtype=DTYPE) for shape in ((rows, N), *shapes)]
    for tensor in made if parameters_too else made[:1]:
        tensor.requires_grad_(grad)
    return made


def _pair(op: str, grad: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Ours and ATen's on the same tensors of PAIR_M rows; "linear_gelu" is linear with that activation."""
    x, *parameters = _tensors(op, PAIR_M, grad, parameters_too=True)
    args: tuple[Any, ...] = {"softmax": (x, -1), "layer_norm": (x, (N,), *parameters)}.get(op, (x, *parameters))
    spec = REGISTRY[op.removesuffix("_gelu")]
    gelu = ("gelu",) if op.endswith("_gelu") else ()
    aten = {"linear": F.linear, "linear_gelu": lambda *args: F.gelu(F.linear(*args))}.get(op, spec.torch_fn)
    return lambda: spec.public(*args, *gelu), lambda: aten(*args)


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("op", ["softmax", "layer_norm", "linear", "linear_gelu"])
def test_ratio(op: str, grad: bool, benchmark: Any, recorder: Recorder) -> None:
    """Ours over ATen's: the two alternate, so that a busy machine slows both, and each counts by the least of its rounds."""
    ours, aten = _pair(op, grad)
    samples: dict[str, list[float]] = {"ours": [], "eager": []}

    def one_round() -> None:
        for name, call in (("ours", ours), ("eager", aten)):
            start = TIMER()
            for _ in range(PAIR_CALLS):
                call()
            samples[name].append((TIMER() - start) / PAIR_CALLS)
            synchronize(DEVICE)

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(), aten(), rtol=CLOSE, atol=CLOSE)
        one_round()
        spin()
        [times.clear() for times in samples.values()]
        benchmark.group = f"host-ratio-{'grad' if grad else 'no_grad'}"
        benchmark.pedantic(one_round, rounds=PAIR_ROUNDS)
    if benchmark.stats is None:  # --benchmark-disable
        return
    ratio = min(samples["ours"]) / min(samples["eager"])
    benchmark.extra_info |= {"ours_over_aten": round(ratio, 3)}
    for name, times in samples.items():
        recorder.add(
            op=op, case=f"{PAIR_M}x{N}", dtype=dtype_name(DTYPE), kind="host", provider=name, shape=f"{PAIR_M}x{N}",
            role="ours" if name == "ours" else "peer", method="alternating loop", status="ok",
            configuration=f"{DEVICE}; {TIMER.__name__}; least of rounds: ours takes {ratio:.2f} of ATen's",
            **{"pass": "train_fwd" if grad else "fwd"}, **spread(times),
        )  # fmt: skip
