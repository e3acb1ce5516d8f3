"""Bad input: ATen's exception type, and a message that names the argument, what came and what is allowed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops.testing import ContractMode, ErrorSample, Op
from tests import process


def _cases() -> list[Any]:
    return [
        pytest.param(spec, error, id=f"{spec.name}-{error.name}") for spec in REGISTRY.values() for error in spec.errors("cpu")
    ]


@pytest.mark.parametrize(("spec", "error"), _cases())
def test_refused_before_anything_runs(spec: Op, error: ErrorSample) -> None:
    with ContractMode() as ran, pytest.raises(error.raises, match=error.match) as caught:
        spec.public(*error.args, **error.kwargs)
    assert not ran.checked
    assert str(caught.value).startswith(spec.public.__name__ + ": ")
    assert "allowed: " in str(caught.value)


def _refused_by_aten(spec: Op, error: ErrorSample) -> bool:
    """Meta tensors pass ATen, the activation's name is ours alone, and ATen multiplies integers on the CPU only. What an op
    without gradients is compared with is an emulation of ours."""
    return spec.trains and error.name not in ("device", "activation") and (spec.name, error.name) != ("linear", "integers")


@pytest.mark.parametrize(("spec", "error"), [case for case in _cases() if _refused_by_aten(*case.values)])
def test_aten_refuses_too(spec: Op, error: ErrorSample) -> None:
    """We refuse nothing that PyTorch accepts; where it refuses, our exception type is one of its."""
    with pytest.raises((RuntimeError, IndexError, TypeError, AttributeError)) as caught:
        spec.torch_fn(*error.args, **error.kwargs)
    if not issubclass(error.raises, TypeError):
        assert isinstance(caught.value, (error.raises, RuntimeError, TypeError))


def test_bad_backend_is_named() -> None:
    result = process.run("import fused_ops", env=os.environ | {"FUSED_OPS_BACKEND": "cuda"})
    assert result.returncode == 1
    assert "FUSED_OPS_BACKEND: got 'cuda', allowed: 'auto', 'triton', 'aten'" in result.stderr


def test_triton_backend_without_a_device_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present: the backend works")
    code = "import torch, fused_ops; fused_ops.fused_softmax(torch.ones(3))"
    environment = {**os.environ, "FUSED_OPS_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    result = process.run(code, env=environment)
    assert result.returncode == 1
    assert "TRITON_INTERPRET=1" in result.stderr
