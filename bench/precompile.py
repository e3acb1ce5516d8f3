"""Compile the kernels that the benchmarks or the tests on the GPU launch, before they run.

    python -m bench.precompile --rows headline|correctness|all [--processes N] [--seconds S]

The last line says how many kernels were compiled, how many were in Triton's cache already, and what failed.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_ops._tools.launches import DEVICE, Gpu, fake_on_gpu
from fused_ops._tools.precompile import Call, gpu_here, precompile
from fused_ops._torch.spec import REGISTRY, Op

from .headline import headline_tasks
from .inputs import argument_sets, outputs
from .measure import step_of
from .tasks import Task, all_tasks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = ("headline", "correctness", "all")


def task_calls(tasks: list[Task]) -> Iterator[Call]:
    """One call for each task, as a measurement makes it."""

    def run(task: Task) -> None:
        step_of(task, task.spec.public, argument_sets(task, 1, DEVICE)[0])()

    for task in tasks:
        yield Call(task.id, functools.partial(run, task))


def contract_calls() -> Iterator[Call]:
    """The samples and the benchmark cases of every op, and the row lengths of tests/gpu, forward and backward, as its tests
    hold them to the contract."""
    for spec in REGISTRY.values():
        for dtype in DTYPES:
            for part in range(4):
                yield Call(f"{spec.name} samples {dtype}", functools.partial(_samples, spec, dtype, part, 4), dispatched=True)
        for case in spec.bench.cases():
            yield Call(f"{spec.name} {case.name}", functools.partial(_case, spec, case.make), dispatched=True)
    yield from _row_lengths()


def _samples(spec: Op, dtype: torch.dtype, part: int, parts: int) -> None:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        samples = list(spec.samples("cpu", dtype))[part::parts]
    for sample in samples:
        _forward_and_backward(spec, tuple(map(fake_on_gpu, sample.args)), {k: fake_on_gpu(v) for k, v in sample.kwargs.items()})


def _case(spec: Op, make: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    _forward_and_backward(spec, *make(DEVICE))


def _row_lengths() -> Iterator[Call]:
    """The lengths and layouts of tests/gpu/test_1_variants.py."""
    try:
        from tests.gpu import test_1_variants as variants

        points = [tuple(point.values) for point in variants.points()]
    except ImportError:  # the tests, or pytest, are not here
        return
    for name, spec in REGISTRY.items():
        if variants.arguments(name, torch.empty(1, 1)) is not None:
            for point in points:
                yield Call(f"{name} {point}", functools.partial(_row_length, spec, *point), dispatched=True)


def _row_length(spec: Op, dtype: torch.dtype, layout: str, N: int) -> None:
    from tests.gpu import test_1_variants as variants

    args, kwargs = variants.arguments(spec.name, variants.rows(N, dtype, layout)) or ((), {})
    _forward_and_backward(spec, args, kwargs)


def _forward_and_backward(spec: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The public function, then its gradients for a dy whose strides are not the output's: what tests/gpu/hold.py does."""
    if spec.trains:
        args, kwargs = tuple(map(_leaf, args)), {k: _leaf(v) for k, v in kwargs.items()}
    out = [o for o in outputs(spec.public(*args, **kwargs)) if o.requires_grad]
    if out:
        wanted = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
        dy = [torch.empty(o.shape[::-1], dtype=o.dtype, device=DEVICE).permute(tuple(range(o.dim()))[::-1]) for o in out]
        torch.autograd.grad(out, wanted, dy, allow_unused=True)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def calls_of(rows: str) -> list[Call]:
    """The calls of a set of rows: those of ROWS."""
    if rows == "headline":
        return list(task_calls(headline_tasks()))
    return list(contract_calls()) if rows == "correctness" else list(task_calls(list(all_tasks())))


def main(arguments: list[str] | None = None) -> int:
    """Precompile, print one line, and return the exit status: 1 where a kernel failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.precompile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", default="headline", help=f"what to compile for: some of {', '.join(ROWS)}, separated by commas"
    )
    parser.add_argument("--processes", type=int, help="processes to compile in; by default one a core")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many seconds")
    parser.add_argument("--gpu", help="for this GPU instead of the one here: a name, a compute capability and an SM count")
    options = parser.parse_args(arguments)
    rows = options.rows.split(",")
    if unknown := [name for name in rows if name not in ROWS]:
        parser.error(f"argument --rows: got {unknown[0]!r}, allowed: {', '.join(ROWS)}")
    if options.processes is not None and options.processes < 1:
        parser.error(f"argument --processes: got {options.processes}, allowed: at least 1")
    if not options.seconds > 0:
        parser.error(f"argument --seconds: got {options.seconds}, allowed: more than 0")
    try:
        gpu = Gpu.parse(options.gpu) if options.gpu else gpu_here()
    except ValueError as error:
        parser.error(f"argument --gpu: {error}")
    if gpu is None:
        print("precompile: torch sees no GPU here, and --gpu names none")
        return 2
    outcome = precompile([call for name in rows for call in calls_of(name)], gpu, options.processes, options.seconds)
    print(f"precompile: {outcome}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at once: what torch tears down takes its time
