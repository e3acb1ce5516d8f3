"""A fused model through the real kernels, in Triton's interpreter: equal to itself unfused, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops import fuse
from tests.fuse.models import MODELS

# Parts of the names of kernels that must have run.
KERNELS = {
    "timm_vit": {"layer_norm_fwd", "layer_norm_bwd", "linear_fwd", "softmax_fwd", "softmax_bwd"},
    "bert": {"layer_norm_fwd", "layer_norm_bwd", "linear_fwd"},
    "gpt2": {"layer_norm_fwd", "layer_norm_bwd", "linear_fwd"},  # Conv1D: the weight is transposed
    "llama": {"linear_fwd"},
}


def last(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", KERNELS)
def test_forward_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = MODELS[name](1)
    model.eval()
    fused = copy.deepcopy(model)
    fuse(fused)
    ran = _watch(monkeypatch)
    results = []
    for m in (fused, model):
        out = last(m(**arguments))
        torch.manual_seed(1)
        (out * torch.randn_like(out)).sum().backward()
        results.append((out, [p.grad for p in m.parameters()]))
    (got, got_grads), (expected, expected_grads) = results
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for (parameter, _), a, b in zip(model.named_parameters(), got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")
    for kernel in KERNELS[name]:
        assert any(kernel in k for k in ran), (kernel, sorted(ran))


def _watch(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that the interpreter runs from now on."""
    from triton.runtime.interpreter import InterpretedFunction

    ran: set[str] = set()
    real = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.add(self.fn.__name__)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return ran


def test_half_precision_runs() -> None:
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU(), nn.Softmax(dim=-1)).half()
    x = torch.randn(5, 24).half()
    expected = model.float()(x.float())
    fuse(model.half())
    torch.testing.assert_close(model(x).float(), expected, rtol=1e-2, atol=1e-3)
