"""The benchmarks made small enough for a CPU that stands for a GPU: tensors, models and roofline; names and shapes stay."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from bench import check, environment, inputs, models, record, roofline, timing
from fused_ops import REGISTRY
from fused_ops.testing import Case

LARGEST = 48
FACTORIES = ("randn", "rand", "randint", "empty", "zeros", "ones", "full", "normal")


class _SmallTensors(TorchFunctionMode):
    """Each size above LARGEST becomes LARGEST, so that shapes that fit each other still do."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FACTORIES:
            first = 2 if func.__name__ == "randint" else 0
            args = args[:first] + tuple(small(a) for a in args[first:])
            kwargs = {k: small(v) if k == "size" else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def small(value: Any) -> Any:
    """Sizes, alone or in a tuple, no larger than LARGEST; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(small(v) for v in value)
    return min(value, LARGEST) if isinstance(value, int) and not isinstance(value, bool) else value


def _small_cases(cases: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    def smaller(case: Case) -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            with _SmallTensors():
                args, kwargs = case.make(device)
            return tuple(small(a) if isinstance(a, tuple) else a for a in args), kwargs

        return dataclasses.replace(case, make=make)

    return lambda: (smaller(case) for case in cases())


def make_small() -> None:
    """For the rest of the process. What it records says that nothing was measured."""
    from bench import test_2_host as host

    host.ROUNDS, host.CALLS, host.PAIR_ROUNDS, host.PAIR_CALLS = 3, 5, 3, 5
    for spec in REGISTRY.values():
        object.__setattr__(spec.bench, "cases", _small_cases(spec.bench.cases))
    models.MODELS = tuple(_small_model(model) for model in models.MODELS)
    roofline.COPY_BYTES, roofline.MATRIX_N, roofline.FP32_N = 1 << 12, LARGEST, 16
    roofline.SPIN_S, roofline.SAMPLES = 0.0, 5
    timing.MAX_CYCLES, timing.MAX_SAMPLES, inputs.MAX_SETS = 2, 10, 4
    few = functools.partial(_few_samples, timing.wall_samples)
    for module in [timing, *(sys.modules[n] for n in ("bench.measure", "bench.test_4_models") if n in sys.modules)]:
        module.wall_samples = few  # type: ignore[attr-defined]
    check.LIMITS |= {dtype: 4 * limit for dtype, limit in check.LIMITS.items()}  # sums of few terms, scaled for many
    environment._smi = lambda query: "SYNTHETIC: no GPU"
    record.clocks = lambda: {"clock_sm_mhz": "1980"}


def _few_samples(sampler: Any, step: Any, device: str, calls: int = 2, samples: int = 5, **clock: Any) -> list[float]:
    return sampler(step, device, min(calls, 2), min(samples, 5), **clock)


def _small_model(model: models.Model) -> models.Model:
    """A narrow one of the same kind, and one short input whatever the batch size."""
    narrow = (LARGEST, 12, 2 * LARGEST)

    def build() -> nn.Module:
        if model.name == "minilm":
            return models.Encoder(width=narrow[0], layers=1)
        return models.PreNormBlock(*narrow, nn.GELU(approximate="tanh"), model.name == "gpt2_block", 1e-5)

    return dataclasses.replace(
        model, build=build, inputs=lambda batch, device, dtype: model.inputs(1, device, dtype)[:, :16, ...][..., :LARGEST]
    )
