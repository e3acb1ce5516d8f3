"""On the CPU, products of 16-bit tensors stay fp32 until their activation is applied; what is exported keeps its dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import fused_gated_linear, fused_linear, fused_mlp
from fused_ops.testing import INTERPRET, decompositions

pytestmark = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")
CALLS: dict[str, Any] = {
    "linear": lambda x, w: fused_linear(x, w, None, "gelu"),
    "gated_linear": lambda x, w: fused_gated_linear(x, w, w, "gelu"),
    "mlp": lambda x, w: fused_mlp(x, w, None, w.t(), None, "gelu"),
}


@pytest.mark.parametrize("op", CALLS)
def test_an_exported_graph_has_no_wider_tensors(op: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            y: Tensor = CALLS[op](x, w)
            return y

    args = torch.randn(4, 8).half(), torch.randn(6, 8).half()
    program = torch.export.export(Model(), args).run_decompositions(decompositions())
    dtypes = {node.meta["val"].dtype for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    assert dtypes == {torch.float16}


@pytest.mark.parametrize("op", CALLS)
def test_an_activation_is_applied_before_rounding(op: str) -> None:
    """And the same bits with gradients as without them."""
    x, w = torch.randn(33, 40).bfloat16(), (torch.randn(24, 40) / 6).bfloat16()
    y = CALLS[op](x, w)
    assert y.dtype is torch.bfloat16
    assert torch.equal(CALLS[op](x.clone().requires_grad_(), w), y)
    if op != "mlp":  # whose second product rounds what it reads
        assert torch.equal(y, CALLS[op](x.float(), w.float()).bfloat16())


@pytest.mark.parametrize("op", CALLS)
def test_unlike_dtypes_are_refused(op: str) -> None:
    for first, second in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"weight1?: got .*, allowed: the dtype of input"):
            CALLS[op](torch.randn(3, 8).to(first), torch.randn(6, 8).to(second))
