"""The forecast of one call: what it launches, compiled and counted here; else from committed counts; else by formula."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._torch.spec import REGISTRY, Case, Op
from . import headline_table
from .forecast import GPUS, Forecast, forecast, gpu_named
from .forecast.counted import Counted
from .forecast.gpus import Gpu
from .forecast.launched import forecast_launches
from .forecast.model import ACTIVATIONS, PASSES, SIZES
from .headline import Row
from .occupancy import VERSIONS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
ACTIVATION_NAMES = ("none", *ACTIVATIONS)


@dataclass(frozen=True)
class Answer:
    """A forecast, the launches that it is of (none where it is by formula), and where their counts are from."""

    forecast: Forecast
    launches: tuple[Counted, ...]
    source: str
    gpu: Gpu
    least: float

    @property
    def percent_of_limit(self) -> float:
        """Of the time that the call's bytes, or its products, take at the least."""
        return 100 * self.least / self.forecast.seconds


class ArgumentError(ValueError):
    """An argument that no forecast is of: which, and why."""

    def __init__(self, argument: str, why: str) -> None:
        super().__init__(why)
        self.argument = argument


def row_of(op: str, sizes: Sequence[int], dtype: str, pass_: str, activation: str, wall: bool = False) -> Row:
    """The arguments as a benchmark row. Raises ArgumentError for what there is no such row of."""
    spec = REGISTRY.get(op)
    if spec is None:
        raise ArgumentError("OP", f"got {op!r}, allowed: {', '.join(REGISTRY)}")
    number = len(next(iter(spec.bench.shapes.values())))
    if len(sizes) != number:
        raise ArgumentError("SIZES", f"{op}: got {len(sizes)} sizes, allowed: {number}")
    if min(sizes) < 1:
        raise ArgumentError("SIZES", f"{op}: got {min(sizes)}, allowed: at least 1")
    for hint, value, allowed in (
        ("--dtype", dtype, tuple(DTYPES)), ("--pass", pass_, PASSES), ("--activation", activation, ACTIVATION_NAMES),
    ):  # fmt: skip
        if value not in allowed:
            raise ArgumentError(hint, f"got {value!r}, allowed: {', '.join(allowed)}")
    if DTYPES[dtype] not in spec.bench.dtypes:
        named = ", ".join(name for name, known in DTYPES.items() if known in spec.bench.dtypes)
        raise ArgumentError("--dtype", f"{op}: got {dtype}, allowed: {named}")
    if activation != "none" and not spec.bench.variants:
        raise ArgumentError("--activation", f"{op} has none: got {activation}")
    if pass_ != "fwd" and not spec.trains:
        raise ArgumentError("--pass", f"{op} has no {pass_}: it is forward only")
    variant = None if activation == "none" else activation
    if variant is None and spec.bench.variants and None not in spec.bench.variants:
        raise ArgumentError("--activation", f"{op} needs one: {', '.join(filter(None, spec.bench.variants))}")
    return Row(spec, _case(spec, tuple(sizes), DTYPES[dtype], variant), pass_, "wall" if wall else "kernel")


def _case(spec: Op, shape: tuple[int, ...], dtype: torch.dtype, variant: str | None) -> Case:
    """The benchmark case of that shape, or one of its own."""
    for case in spec.bench.cases():
        if case.shape == shape and case.dtype is dtype and (not spec.bench.variants or case.name.endswith(f"_{variant}")):
            return case
    make = functools.partial(_made, spec, shape, dtype, variant)
    return Case("x".join(map(str, shape)), dtype, shape, make)


def _made(
    spec: Op, shape: tuple[int, ...], dtype: torch.dtype, variant: str | None, device: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return spec.bench.make(device, shape, dtype, variant)


def gpu_of(name: str) -> Gpu:
    """The coefficients of a GPU. Raises ArgumentError where there are none."""
    gpu = gpu_named(name)
    if gpu is None:
        raise ArgumentError("--gpu", f"got {name!r}, allowed: {', '.join(GPUS)}")
    return gpu


def forecast_call(row: Row, activation: str, gpu: Gpu, quick: bool = False, jobs: int | None = None) -> Answer:
    """The forecast of a row. quick: nothing is compiled.

    Raises ArgumentError where nothing can be compiled, nothing is committed and no formula is of the op; RuntimeError where a kernel
    does not compile.
    """
    wall = row.kind == "wall"
    launches, source = _committed(row) if quick or importlib.util.find_spec("triton") is None else _compiled(row, jobs)
    least = row.work()[0] / gpu.copy
    if row.op.roles.multiplies:
        least = max(least, row.work()[1] / gpu.rates[row.case.dtype.itemsize])
    if launches:
        found = forecast_launches(launches, gpu, row.op.name, row.pass_, wall)
    elif row.op.name in SIZES:
        found = forecast(
            row.op.name, row.case.shape, row.case.dtype.itemsize, row.pass_, gpu, kind=row.kind, activation=activation
        )  # fmt: skip
    else:
        raise ArgumentError("OP", f"{row.op.name}: no formula is of it, and this shape is not in the committed table")
    return Answer(found, tuple(launches), source, gpu, least)


def _compiled(row: Row, jobs: int | None) -> tuple[Sequence[Counted], str]:
    counted, triton = headline_table.count([row], jobs=jobs)
    return counted[row.key], f"compiled by Triton {triton}" if triton else "no kernel of ours"


def _committed(row: Row) -> tuple[Sequence[Counted], str]:
    """The row's launches by the newest table that has it; none where it is by formula."""
    for version in reversed(VERSIONS):
        path = headline_table.table_of(version)
        if found := headline_table.load(path).get(row.key):
            return found, path.name
    return (), "formulas"
