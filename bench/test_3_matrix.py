"""The matrix on a GPU: every case of every op, each pass, each provider that is here, in priority order."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .failure import CONTEXT_LOST, exit_if_context_is_lost, first_line
from .headline import sweep
from .measure import Bundle, Measurement, Skip, describe, release
from .patience import at_most
from .providers import PROVIDERS, Unsupported, by_name
from .record import Recorder
from .roofline import Roofline
from .tasks import Task, matrix
from .timing import DeviceClock

DEVICE = "cuda"
CLOCK = DeviceClock()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@functools.cache
def _absent() -> dict[str, str]:
    """Provider -> why it is absent, for those that are."""
    return {p.name: reason for p in PROVIDERS if (reason := p.available(DEVICE))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "task" in metafunc.fixturenames:
        here = [p.name for p in PROVIDERS if p.name not in _absent()] if torch.cuda.is_available() else []
        only, sweeps = metafunc.config.getoption("--bench-only"), metafunc.config.getoption("--bench-sweep")
        chosen = matrix(only, here)
        if sweeps:
            pairs = sweep(map(int, sweeps.split(",")), here)
            chosen = [(task, provider) for task, provider in pairs if re.search(only, f"{task.id}-{provider}")]
        metafunc.parametrize(("task", "provider"), [pytest.param(t, p, id=f"{t.id}-{p}") for t, p in chosen])


class _Current:
    """The argument sets and the reference of the task that is being measured, shared by its providers."""

    bundle: Bundle | Skip | None = None

    def of(self, task: Task) -> Bundle:
        if not isinstance(self.bundle, Bundle) or self.bundle.task is not task:
            self.bundle = None
            release()
            self.bundle = Bundle.of(task, DEVICE)
        return self.bundle


@pytest.fixture(scope="module")
def current() -> Iterator[_Current]:
    holder = _Current()
    yield holder
    holder.bundle = None
    release()


def test_absent_providers(recorder: Recorder) -> None:
    """Each absent provider is in the results with its reason."""
    for name, reason in _absent().items():
        recorder.add(provider=name, role=by_name(name).role, status="absent", reason=reason)


@pytest.mark.benchmark(timer=CLOCK)
def test_provider(
    task: Task, provider: str, benchmark: Any, recorder: Recorder, roofline: Roofline | None, current: _Current,
    measured_already: Callable[..., bool], patience: float,
) -> None:  # fmt: skip
    who = by_name(provider)
    names = describe(task, who)
    if measured_already({**task.key, "provider": provider}):
        pytest.skip("measured already")
    try:
        with at_most(patience, lambda reason: recorder.add(**names, status="error", reason=reason), CONTEXT_LOST):
            bundle = current.of(task)
            measurement = Measurement(who, bundle)
            if task.kind == "kernel" and measurement.verdict.right:
                measurement.capture()
            samples = measure(measurement, benchmark)
            row = recorder.add(**measurement.row(samples, roofline))
    except Unsupported as reason:
        recorder.add(**names, status="unsupported", reason=str(reason))
        pytest.skip(str(reason))
    except Skip as reason:
        recorder.add(**names, status="skipped", reason=str(reason))
        pytest.skip(str(reason))
    except Exception as error:
        recorder.add(**names, status="error", reason=first_line(error))
        exit_if_context_is_lost()
        release()
        if who.role == "peer" or isinstance(error, torch.cuda.OutOfMemoryError):
            pytest.skip(f"{provider} failed: {first_line(error)}")
        raise
    benchmark.extra_info.update({k: v for k, v in row.items() if v != ""})
    if who.role == "ours":
        assert measurement.verdict.right, measurement.verdict.reason()


def measure(measurement: Measurement, benchmark: Any) -> list[float]:
    """Time it under pytest-benchmark, whose clock is moved by device time (kernel) or by the mean wall time of a call."""
    benchmark.group = measurement.task.id
    if not measurement.verdict.right:
        benchmark.skipped = True  # wrong, so not timed
        return []
    samples: list[float] = []
    if measurement.replay is None:
        samples = measurement.wall()
        remaining = iter(samples)
        benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(samples))
        return samples
    replay = measurement.replay

    def one_replay() -> None:
        samples.append(replay.sample())
        CLOCK.advance(samples[-1])

    benchmark.pedantic(one_replay, rounds=measurement.rounds())
    return samples
