"""Every entry of the registry is complete, and torch agrees with how it is registered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fused_ops
from fused_ops import REGISTRY
from fused_ops._torch.library import define
from fused_ops.testing import ErrorSample, Op, Sample, decompositions

OPTIONAL = {"backward", "formula", "module", "onnx", "reason", "tuned"}  # None says something about the op
SPECS = [pytest.param(spec, id=name) for name, spec in REGISTRY.items()]


def test_families() -> None:
    assert {"softmax", "layer_norm", "linear"} <= set(REGISTRY)


@pytest.mark.parametrize("spec", SPECS)
def test_complete(spec: Op) -> None:
    for entry in filter(None, (spec, spec.backward, spec.bench)):
        for field in dataclasses.fields(entry):
            if field.name not in OPTIONAL:
                assert getattr(entry, field.name) not in (None, "", {}), f"{spec.name}: {field.name} is empty"
    assert spec.public is getattr(fused_ops, spec.public.__name__)
    assert spec.public.__doc__
    assert all(word in spec.public.__doc__ for word in ("Args:", "Returns:", "Raises:", "float32"))


@pytest.mark.parametrize("spec", SPECS)
def test_generators_yield(spec: Op) -> None:
    samples = list(spec.samples("cpu", torch.float32))
    errors = list(spec.errors("cpu"))
    assert len(samples) >= 10
    assert len(errors) >= 5
    assert all(isinstance(s, Sample) for s in samples)
    assert all(isinstance(e, ErrorSample) for e in errors)
    assert len({s.name for s in samples}) == len(samples)
    tags = [tag for sample in samples for tag in sample.tags]
    assert set(tags) <= {"basic", "smooth", "addressing", "first", "slow"}
    assert tags.count("basic") == 1
    assert tags.count("addressing") >= 3
    assert tags.count("smooth") >= 4 or not spec.trains
    assert 1 <= tags.count("first") <= 10
    example = spec.example("cpu", torch.bfloat16)
    assert all(a.numel() > 0 for a in example.args if isinstance(a, torch.Tensor))
    cases = list(spec.bench.cases())
    assert cases
    for case in cases:
        for forward, backward in (spec.bench.bytes(case), spec.bench.flops(case)):
            assert forward > 0
            assert (backward > 0) == spec.trains


@pytest.mark.parametrize("spec", SPECS)
def test_registered(spec: Op) -> None:
    assert [raw.overload for raw in spec.raw] == [spec.fwd, spec.bwd] if spec.trains else [spec.fwd]
    for overload in (raw.overload for raw in spec.raw):
        assert overload in decompositions()
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(overload.name(), key)


def test_defined_once() -> None:
    with pytest.raises(ValueError, match="defined twice"):
        define(REGISTRY["softmax"])


def test_headlines_name_cases_and_no_two_have_one_rank() -> None:
    ranks = [headline.rank for op in REGISTRY.values() for headline in op.bench.headline]
    assert len(set(ranks)) == len(ranks) > 10
    for op in REGISTRY.values():
        known = {(case.name, case.dtype) for case in op.bench.cases()}
        assert {(case, headline.dtype) for headline in op.bench.headline for case in headline.cases} <= known
