"""What is measured of every op: each baseline computes what the op does, and its shapes and passes are those of the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import tasks
from fused_ops import REGISTRY
from fused_ops.testing import Op
from tests.bench.small import arguments

OPS = [pytest.param(op, id=name) for name, op in REGISTRY.items()]
BASELINES = [pytest.param(op, name, id=f"{op.name}-{name}") for op in REGISTRY.values() for name in op.bench.baselines]


def values(result: Any) -> tuple[Tensor, ...]:
    """The results in fp32, one or several."""
    return tuple(t.float() for t in ((result,) if isinstance(result, Tensor) else result))


@pytest.mark.parametrize(("op", "baseline"), BASELINES)
def test_a_baseline_computes_what_the_op_does(op: Op, baseline: str) -> None:
    for variant in op.bench.variants or (None,):
        args, kwargs = arguments(op, variant=variant)
        ours, theirs = (values(f(*args, **kwargs)) for f in (op.public, op.bench.baselines[baseline]))
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("op", [op for op in OPS if op.values[0].trains])  # type: ignore[attr-defined]
def test_the_eager_baseline_trains_as_the_op_does(op: Op) -> None:
    assert next(iter(op.bench.baselines)) == "eager"
    args, kwargs = arguments(op)
    leaves = [a.requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    ours, theirs = (
        torch.autograd.grad(function(*args, **kwargs).square().sum(), leaves)
        for function in (op.public, op.bench.baselines["eager"])
    )
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("op", OPS)
def test_its_cases_are_measured_against_the_baselines(op: Op) -> None:
    """torch's function is a baseline, and the headline's cases are of the op."""
    assert op.bench.baselines
    cases = {(case.name, case.dtype) for case in op.bench.cases()}
    assert {(case, headline.dtype) for headline in op.bench.headline for case in headline.cases} <= cases


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_measured(op: Op) -> None:
    """Forward, and backward where there is one, of every case."""
    found = [task for task in tasks.all_tasks() if task.spec is op]
    assert {task.case.name for task in found} == {case.name for case in op.bench.cases()}
    passes = {task.pass_ for task in found}
    assert "fwd" in passes
    assert ("bwd" in passes) == op.trains
