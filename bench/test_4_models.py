"""End to end: inference latency and throughput, and a training step, of whole models, each beside its accuracy.

On a machine without a GPU: CPU inference of one model's exported artefacts in fp32, on one thread, in CPU time, which
other processes on the machine do not lengthen as they do wall time.
"""

from __future__ import annotations

import copy
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .check import relative_error
from .failure import CONTEXT_LOST, exit_if_context_is_lost, first_line
from .models import MODELS, Model
from .patience import at_most
from .providers import Unsupported
from .providers.whole_models import MODEL_PROVIDERS
from .record import Recorder, spread
from .timing import DeviceClock, Replay, wall_samples

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMITS = {"bf16": 0.15, "fp16": 0.02, "fp32": 1e-3}
"""The largest |out - fp64| / (|fp64| + rms of its row) of a model's output that still counts as the same model."""
CLOCK = DeviceClock()


def _cases() -> Iterator[Any]:
    """(model, dtype, batch, pass, kind), the ones that matter most first."""
    if not ON_GPU:
        yield MODELS[0], "fp32", 1, "fwd", "cpu"
        return
    for dtype in ("bf16", "fp16"):
        for model in MODELS:
            yield model, dtype, model.latency, "fwd", "wall"
            yield model, dtype, model.throughput, "fwd", "kernel"
            if dtype == "bf16":
                yield model, dtype, model.training, "train_step", "wall"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    only = metafunc.config.getoption("--bench-only")
    params = []
    pairs = [(case, provider) for case in _cases() for provider in MODEL_PROVIDERS]
    for (model, dtype, batch, pass_, kind), provider in sorted(
        pairs, key=lambda pair: pair[1].tier + 2 * (pair[0][1] == "fp16")
    ):
        name = f"model-{model.name}_b{batch}-{dtype}-{pass_}-{kind}-{provider.name}"
        if re.search(only, name):
            params.append(pytest.param(model, dtype, batch, pass_, kind, provider, id=name))
    metafunc.parametrize(("model", "dtype", "batch", "pass_", "kind", "provider"), params)


@functools.lru_cache(1)
def _setting(name: str, dtype: str, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(the unfused model in dtype on the device, an input, the output of the same weights in fp64)."""
    model = next(m for m in MODELS if m.name == name)
    module = model.build().eval().requires_grad_(False).to(device=DEVICE, dtype=DTYPES[dtype])
    x = model.inputs(batch, DEVICE, DTYPES[dtype])
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(x.double() if x.is_floating_point() else x)
    return module, x, expected


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """CPU time is a latency only where one thread does all the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if ON_GPU else 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(timer=CLOCK)
def test_model(
    model: Model, dtype: str, batch: int, pass_: str, kind: str, provider: Any, benchmark: Any, recorder: Recorder,
    measured_already: Callable[..., bool], patience: float,
) -> None:  # fmt: skip
    names: dict[str, Any] = {
        "op": "model", "case": f"{model.name}_b{batch}", "dtype": dtype, "pass": pass_, "kind": kind,
        "provider": provider.name, "role": provider.role, "shape": f"{batch}x{model.length}",
    }  # fmt: skip
    if measured_already(names):
        pytest.skip("measured already")
    if reason := provider.available(DEVICE):
        recorder.add(**names, status="absent", reason=reason)
        pytest.skip(reason)
    try:
        with at_most(patience, lambda reason: recorder.add(**names, status="error", reason=reason), CONTEXT_LOST):
            module, x, expected = _setting(model.name, dtype, batch)
            own, run, said = provider.prepare(module, x, training=pass_ == "train_step")
            with torch.no_grad():
                error = relative_error(run(x), expected)
            right = error <= LIMITS[dtype]
            samples, method = _measure(own, run, x, pass_, kind) if right else ([], "")
    except Unsupported as reason:
        recorder.add(**names, status="unsupported", reason=str(reason))
        pytest.skip(str(reason))
    except Exception as error:
        recorder.add(**names, status="error", reason=first_line(error))
        if ON_GPU:
            exit_if_context_is_lost()
        if provider.role == "peer":
            pytest.skip(f"{provider.name} failed: {first_line(error)}")
        raise
    names |= {"configuration": said, "error": f"{error:.3g}", "error_limit": LIMITS[dtype]}
    if not right:
        recorder.add(**names, status="wrong", reason=f"output: relative error {error:.3g}, allowed {LIMITS[dtype]:g}")
        assert provider.role == "peer", f"ours differs from the fp64 model by {error:.3g}"
        pytest.skip("wrong, not timed")
    remaining = iter(samples)
    benchmark.group = f"{names['case']}-{dtype}-{pass_}-{kind}"
    benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(samples))
    row = recorder.add(**names, status="ok", method=method, **spread(samples))
    benchmark.extra_info.update({k: v for k, v in row.items() if v != ""})


def _measure(own: nn.Module, run: Any, x: Tensor, pass_: str, kind: str) -> tuple[list[float], str]:
    if pass_ == "train_step":
        step = training_step(own, run, x)
        return wall_samples(step, DEVICE, calls=5, samples=12), "loop"

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(x),)

    if kind == "kernel":
        replay = Replay([forward])
        return replay.series(), replay.method
    if kind == "cpu":
        return wall_samples(forward, DEVICE, calls=2, samples=12, clock=time.process_time), "loop"
    return wall_samples(forward, DEVICE, calls=20, samples=30), "loop"


def training_step(own: nn.Module, run: Any, x: Tensor) -> Any:
    """Forward, backward and a fused AdamW step, all in the model's dtype. The loss pairs the output with a random target."""
    own.requires_grad_(True)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=ON_GPU)
    with torch.no_grad():
        target = torch.randn_like(run(x))

    def step() -> tuple[Tensor, ...]:
        loss = (run(x) * target).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)

    return step
