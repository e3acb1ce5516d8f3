"""Kernel times are taken fairly: everybody by graph who can be, on a GPU that is awake, and a failure costs only its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure, roofline, timing
from bench.measure import Bundle, Measurement
from bench.patience import TooSlow
from bench.providers import Provider, by_name
from bench.timing import Replay, capture, side_stream
from fused_ops import REGISTRY
from tests.bench import fake_cuda
from tests.bench.small import Made, task

CYCLES = 3  # in a graph, at the most


@pytest.fixture
def gpu() -> Iterator[fake_cuda.GPU]:
    """Without the fixture monkeypatch, which would outlive it: what a test patches in torch.cuda is undone before this is."""
    with pytest.MonkeyPatch.context() as patched, fake_cuda.installed() as fake:
        patched.setattr("bench.inputs.MAX_SETS", 3)
        for name, few in (("MAX_CYCLES", CYCLES), ("MAX_SAMPLES", timing.MIN_SAMPLES), ("SPIN_S", 0.0)):
            patched.setattr(timing, name, few)
        yield fake


def measured(provider: Provider, op: str, pass_: str) -> Measurement:
    measurement = Measurement(provider, Bundle.of(task(op, pass_, "kernel"), "cuda"))
    measurement.capture()
    return measurement


@pytest.mark.parametrize("pass_", ["bwd", "fwd", "train_fwd", "fwd+bwd"])
@pytest.mark.parametrize("op", [name for name, op in REGISTRY.items() if op.trains])
@pytest.mark.parametrize("provider", ["eager", "ours"])
def test_the_first_measurement_of_a_process_gets_its_graph(provider: str, op: str, pass_: str, gpu: fake_cuda.GPU) -> None:
    measurement = measured(by_name(provider), op, pass_)
    assert measurement.replay is not None
    assert (measurement.replay.method, measurement.replay.why_no_graph) == ("graph", "")
    assert measurement.verdict.right, measurement.verdict.reason()
    assert gpu.current is gpu.default


@pytest.mark.parametrize("provider", ["eager", "ours"])
def test_a_forward_kept_on_another_stream_is_made_again(provider: str, gpu: fake_cuda.GPU) -> None:
    bundle = Bundle.of(task("layer_norm", "bwd", "kernel"), "cuda")
    call = measure.prepare(by_name(provider), bundle).call
    steps = [measure.step_of(bundle.task, call, arguments) for arguments in bundle.sets]
    [step() for step in steps]  # on the default stream
    with side_stream(), pytest.raises(RuntimeError, match="legacy stream depend on a capturing"):
        capture(steps, 1)
    assert Replay(steps).method == "graph"


def _item(x: Tensor) -> None:
    float(x.detach().sum())


def _another_stream(x: Tensor) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        x + 1


def _python_error(x: Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("not while it captures")


def _waits_for_an_event(x: Tensor) -> None:
    event = torch.cuda.Event()
    event.record()
    event.synchronize()


def _leaves_its_stream(x: Tensor) -> None:
    torch.cuda.set_stream(torch.cuda.Stream())
    torch.cuda.synchronize()


FAULTS = {
    "item": _item,
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": _waits_for_an_event,
    "another stream": _another_stream,
    "default stream": lambda x: torch.cuda.default_stream().wait_stream(torch.cuda.current_stream()),
    "Python": _python_error,
    "its own capture": lambda x: torch.cuda.CUDAGraph().capture_begin(),
    "leaves its stream": _leaves_its_stream,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_capture_leaves_everything_usable(fault: str, gpu: fake_cuda.GPU) -> None:
    """The provider is timed by events, with the reason; the stream, the allocator, random numbers and the next one are well."""

    def call(x: Tensor, dim: int) -> Tensor:
        if gpu.capturing is not None:
            FAULTS[fault](x)
        return F.softmax(x, dim)

    measurement = measured(Made(call), "softmax", "fwd+bwd")
    replay = measurement.replay
    assert replay is not None
    assert replay.method == "events"
    assert replay.why_no_graph.startswith("no CUDA graph: ")
    assert measurement.verdict.right
    assert measurement.row(replay.series(), None)["configuration"] == replay.why_no_graph
    assert (gpu.current, gpu.capturing, gpu.open_pool) == (gpu.default, None, False)
    assert torch.randn(3, device="cuda").isfinite().all()
    for pass_ in ("fwd", "bwd"):
        after = measured(by_name("eager"), "softmax", pass_).replay
        assert after is not None
        assert after.method == "graph"


def test_a_backward_after_a_failed_capture_has_its_forward_on_the_stream_that_times_it(gpu: fake_cuda.GPU) -> None:
    forwards: list[Any] = []

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            forwards.append(torch.cuda.current_stream())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            torch.cuda.synchronize()
            return dy

    x = torch.randn(4, device="cuda").requires_grad_()
    step = measure._Backward(lambda: (Waits.apply(x),), [x], [torch.ones(4, device="cuda")])
    step()
    replay = Replay([step])
    assert replay.method == "events"
    assert forwards == [gpu.default, timing._stream(), timing._stream()]
    assert {node.metadata["stream"] for node in fake_cuda._nodes(step.kept)} == {timing._stream()}


def test_a_measurement_that_takes_too_long_is_not_a_failed_capture(gpu: fake_cuda.GPU) -> None:
    def slow() -> tuple[Tensor, ...]:
        if gpu.capturing is not None:
            raise TooSlow("took more than 25 s")
        return (torch.ones(3),)

    with pytest.raises(TooSlow):
        Replay([slow])
    assert (gpu.current, gpu.capturing, gpu.open_pool) == (gpu.default, None, False)


def test_a_capture_short_of_memory_is_tried_again_without_the_cache(
    gpu: fake_cuda.GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))

    def step() -> tuple[Tensor, ...]:
        if gpu.capturing is not None and not emptied:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return (torch.ones(3),)

    assert Replay([step]).method == "graph"
    assert emptied == [1]


def test_a_provider_that_cannot_be_captured_is_not_tried(gpu: fake_cuda.GPU) -> None:
    replay = Replay([lambda: (torch.ones(3),)], "it has streams of its own")
    assert (replay.method, replay.why_no_graph) == ("events", "no CUDA graph: it has streams of its own")
    assert gpu.captures == 0


@pytest.mark.parametrize(("launch_s", "cycles"), [(1e-3, 1), (1e-4, 2), (1e-7, CYCLES)])
def test_short_steps_are_repeated_in_a_graph(
    launch_s: float, cycles: int, gpu: fake_cuda.GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what a graph takes to begin does not show; a step's time is that of one call all the same."""
    monkeypatch.setattr(fake_cuda, "LAUNCH_S", launch_s)
    x = torch.ones(2)
    replay = Replay([lambda: (x + 1,), lambda: (x + 2,)])
    assert replay.count == 2 * cycles
    assert replay.sample() == pytest.approx(launch_s, rel=1e-2)
    replay.poison()
    assert all(r.isnan().all() for (r,) in replay.results)
    replay.run()
    assert [r.tolist() for (r,) in replay.results] == [[2.0, 2.0], [3.0, 3.0]]
    assert len({r.data_ptr() for (r,) in replay.results}) == 2


@pytest.fixture
def spins(gpu: fake_cuda.GPU, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each call of spin, which here takes a second of the device's."""
    seen: list[float] = []

    def spin(seconds: float = 0.02) -> None:
        seen.append(seconds)
        gpu.seconds += 1.0

    monkeypatch.setattr(timing, "spin", spin)
    return seen


def test_the_clocks_are_brought_up_before_each_series_and_outside_it(spins: list[float], gpu: fake_cuda.GPU) -> None:
    replay = Replay([lambda: (torch.ones(3),)])
    assert spins == []
    for expected in (1, 2):
        assert max(replay.series(4)) < 0.1
        assert len(spins) == expected
    measurement = measured(by_name("eager"), "softmax", "bwd")
    assert measurement.rounds() >= timing.MIN_SAMPLES
    assert len(spins) == 3
    timing.wall_samples(lambda: (), "cuda", 1, 3)
    assert len(spins) == 4
    timing.wall_samples(lambda: (), "cpu", 1, 3)
    assert len(spins) == 4


def test_the_roofline_is_measured_awake_and_often(
    spins: list[float], gpu: fake_cuda.GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert roofline.SPIN_S >= 0.5
    assert roofline.SAMPLES >= 100
    for name, value in (("COPY_BYTES", 4096), ("MATRIX_N", 32), ("FP32_N", 16)):
        monkeypatch.setattr(roofline, name, value)
    replays = [roofline.copy_replay(), *(roofline.matmul_replay(case) for case in roofline.matmul_cases())]
    for replay in replays:
        assert replay.method == "graph"
        assert max(replay.series(5, roofline.SPIN_S)) < 0.1
    assert spins == [roofline.SPIN_S] * len(replays)
    assert roofline.matmul_cases()[:2] == ["bf16", "float8_e4m3fn"]


@pytest.mark.parametrize("by_row", [False, True])
def test_fp8_operands_fill_the_range(by_row: bool) -> None:
    """Normal numbers of a product's size lie below e4m3's smallest normal number; scaled, nearly all lie above it."""
    x = torch.randn(64, 96) * 1e-3
    q, scale = roofline._quantised(x, by_row)
    assert scale.shape == ((64, 1) if by_row else ())
    assert q.float().abs().max() == 448
    assert (q.float().abs() < 2**-6).float().mean() < 1e-2
    torch.testing.assert_close(q.float() * scale, x, rtol=0.07, atol=float(scale.max()) * 2**-9)


def test_spin_works_on_a_gpu_and_only_there(gpu: fake_cuda.GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    before = gpu.launches
    timing.spin(0.0)
    assert gpu.launches > before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = gpu.launches
    timing.spin(5.0)
    assert gpu.launches == before


def test_objects_seen_once_are_not_collected_again(gpu: fake_cuda.GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(1))
    monkeypatch.setattr(measure, "SLOW_COLLECTION_S", float("inf"))
    measure.release()
    assert frozen == []
    monkeypatch.setattr(measure, "SLOW_COLLECTION_S", -1.0)
    measure.release()
    assert frozen == [1]


def test_the_fake_refuses_what_cuda_refuses(gpu: fake_cuda.GPU) -> None:
    """The layer that these tests stand on, and what torch 2.11 leaves behind when a capture fails."""
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        torch.cuda.CUDAGraph().replay()
    failed, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="previous error during capture"), torch.cuda.graph(failed, stream=stream):
        torch.ones(3).sum().item()
    assert gpu.current is stream
    with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
        torch.randn(3)
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        failed.replay()


def test_the_fakes_graph_computes_at_its_replay(gpu: fake_cuda.GPU) -> None:
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x.exp()
        x.add_(1)
    assert y.isnan().all()  # nothing has run
    x.fill_(0.0)
    graph.replay()
    assert (y.tolist(), x.tolist()) == ([1.0] * 3, [1.0] * 3)


def test_nothing_of_the_fake_stays() -> None:
    """After the tests above, torch.cuda is its own again."""
    before = {name: getattr(torch.cuda, name) for name in ("is_available", "Stream", "set_stream", "synchronize")}
    with fake_cuda.installed():
        assert torch.cuda.get_device_name() == fake_cuda.NAME
        assert torch.ones(2, device="cuda").device.type == "cpu"
    assert {name: getattr(torch.cuda, name) for name in before} == before
    assert {value.__module__.partition(".")[0] for value in before.values()} == {"torch"}
