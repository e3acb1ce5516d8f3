"""A provider that computes something else is wrong, not fast; one that computes the same in its own way is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import check
from bench.measure import Bundle, Measurement
from bench.providers import by_name
from bench.timing import Replay
from fused_ops import REGISTRY
from tests.bench import fake_cuda
from tests.bench.small import Made, task


def _last_row_forgotten(x: torch.Tensor, dim: int) -> torch.Tensor:
    y = F.softmax(x, dim)
    return torch.cat([y[:-1], torch.zeros_like(y[-1:])])


def _one_element_off(x: torch.Tensor, dim: int) -> torch.Tensor:
    y = F.softmax(x, dim).clone()
    y[3, 7] *= 1.5
    return y


def _nan_in_one_place(x: torch.Tensor, dim: int) -> torch.Tensor:
    y = F.softmax(x, dim).clone()
    y[0, 0] = float("nan")
    return y


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "returns its input": ("softmax", lambda x, dim: x),
    "zeros": ("softmax", lambda x, dim: torch.zeros_like(x)),
    "another dimension": ("softmax", lambda x, dim: F.softmax(x, 0)),
    "last row forgotten": ("softmax", _last_row_forgotten),
    "one element off": ("softmax", _one_element_off),
    "a NaN": ("softmax", _nan_in_one_place),
    "another shape": ("softmax", lambda x, dim: F.softmax(x, dim)[:-1]),
    "no bias": ("layer_norm", lambda x, shape, w, b, eps=1e-5: F.layer_norm(x, shape, w, None)),
    "eps of 1e-2": ("layer_norm", lambda x, shape, w, b, eps=1e-5: F.layer_norm(x, shape, w, b, 1e-2)),
    "no activation": ("linear", lambda x, w, b, act: F.linear(x, w, b)),
    "tanh for erf": ("linear", lambda x, w, b, act: F.gelu(F.linear(x, w, b), approximate="tanh")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_forward_is_reported_and_not_timed(name: str) -> None:
    op, call = WRONG[name]
    measurement = Measurement(Made(call), Bundle.of(task(op), "cpu"))
    row = measurement.row([], None)
    assert row["status"] == "wrong"
    assert "relative error" in row["reason"]
    assert "p50_us" not in row


@pytest.mark.parametrize("pass_", ["bwd", "fwd+bwd"])
def test_wrong_gradient_is_reported(pass_: str) -> None:
    class ForgetsTheMean(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return F.layer_norm(x, (40,), w, b)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            x, w = ctx.saved_tensors
            std, mean = torch.std_mean(x, -1, correction=0, keepdim=True)
            return dy * w / std, (dy * (x - mean) / std).sum(0), dy.sum(0)

    provider = Made(lambda x, shape, w, b, eps=1e-5: ForgetsTheMean.apply(x, w, b))
    assert Measurement(provider, Bundle.of(task("layer_norm", pass_), "cpu")).row([], None)["status"] == "wrong"


@pytest.mark.parametrize("pass_", ["fwd", "train_fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", [name for name, op in REGISTRY.items() if op.trains])
@pytest.mark.parametrize("provider", ["eager", "ours"])
def test_right_providers_pass(provider: str, op: str, dtype: torch.dtype, pass_: str) -> None:
    measurement = Measurement(by_name(provider), Bundle.of(task(op, pass_, dtype=dtype), "cpu"))
    assert measurement.verdict.right, measurement.verdict.reason()
    row = measurement.row(measurement.steps[0]() and [3e-6, 1e-6, 2e-6], None)
    assert (row["status"], row["p50_us"]) == ("ok", "2")


@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("op", [name for name, op in REGISTRY.items() if op.trains and not op.roles.multiplies])
def test_reference_in_blocks_is_the_reference(op: str, pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.of(task(op, pass_), "cpu")
    whole = check.expected(bundle.task, bundle.sets[0])
    monkeypatch.setattr(check, "CHUNK", 7 * 40)
    blocks = check.expected(bundle.task, bundle.sets[0])
    assert len(whole) == len(blocks)
    for a, b in zip(whole, blocks):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture
def gpu() -> Iterator[fake_cuda.GPU]:
    with pytest.MonkeyPatch.context() as patched, fake_cuda.installed() as fake:
        patched.setattr("bench.inputs.MAX_SETS", 3)
        yield fake


@pytest.mark.usefixtures("gpu")
def test_an_unwritten_result_shows_after_the_capture() -> None:
    """A provider whose replays leave their output alone passes the first check and fails the one after poisoning."""
    kept: list[torch.Tensor] = []

    def lazy(x: torch.Tensor, dim: int) -> torch.Tensor:
        if not kept:
            kept.append(F.softmax(x, dim))
        return kept[0]

    measurement = Measurement(Made(lazy), Bundle.of(task("softmax", kind="kernel"), "cuda"))
    assert measurement.verdict.right
    measurement.capture()
    assert not measurement.verdict.right
    assert measurement.row([], None)["status"] == "wrong"


@pytest.mark.usefixtures("gpu")
def test_poisoning_spares_the_arguments() -> None:
    """A wrong provider may return its input: filling that with NaN would spoil the sets of the providers after it."""
    bundle = Bundle.of(task("softmax", kind="kernel"), "cuda")
    Measurement(Made(lambda x, dim: x), bundle).capture()
    assert bundle.sets[0].args[0].isfinite().all()


@pytest.mark.usefixtures("gpu")
def test_capture_falls_back_to_events_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not here")

    monkeypatch.setattr(fake_cuda.Graph, "capture_begin", refuse)
    measurement = Measurement(by_name("eager"), Bundle.of(task("softmax", kind="kernel"), "cuda"))
    replay = measurement.capture()
    assert (replay.method, measurement.verdict.right) == ("events", True)
    assert "no CUDA graph: RuntimeError: not here" in replay.why_no_graph
    assert isinstance(replay, Replay)
