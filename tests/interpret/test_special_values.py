"""The kernels at NaN, infinities and large finite values: every epilogue, forward and backward, has what torch has in each place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY, fused_gated_linear, fused_linear
from fused_ops.kernels.config import MatmulConfig
from fused_ops.ops.linear.activations import ACTIVATIONS, SAVES_OUTPUT
from fused_ops.ops.linear.matmul_plan import forced_config
from tests.special_values import DY, INF, NAMES, PRE, exact, pairs

CONFIGS = {
    "pointer": MatmulConfig(16, 32, 32, num_warps=4, num_stages=2, group_m=2),
    "tma": MatmulConfig(16, 64, 32, num_warps=4, num_stages=2, group_m=2, kind="tma", subtiles=2),
    "split_k": MatmulConfig(16, 32, 16, num_warps=4, num_stages=2, kind="split_k", splits=2),
}
WIDE_PRE = (*PRE, *(0.5,) * 5)  # 16 columns: rows of a multiple of 16 bytes, which TMA needs


def same(out: Tensor, expected: Tensor) -> None:
    """Within what bf16 rounds off, which the interpreter cuts off; NaN, infinities and zeros in equal places."""
    torch.testing.assert_close(out, expected.to(out.dtype), equal_nan=True, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("op", "dtype"), [("linear", torch.float32), ("linear", torch.bfloat16), ("gated", torch.float32)])
@pytest.mark.parametrize("activation", NAMES)
def test_every_pair(activation: str, op: str, dtype: torch.dtype) -> None:
    """linear_act_bwd_kernel and gate_bwd_kernel, by biases on products that are 0. fp32 takes other branches than 16 bits."""
    pre, dy = pairs(dtype)
    x, w, bias = torch.zeros(1, 1, dtype=dtype), torch.zeros(pre.shape[0], 1, dtype=dtype), pre.clone().requires_grad_()
    if op == "linear":
        y = fused_linear(x, w, bias, activation)
    else:
        y = fused_gated_linear(x, w, w, activation, bias, torch.ones_like(pre))
    same(y[0], ACTIVATIONS[activation](pre.double()))
    y.backward(dy[None])
    same(bias.grad, exact(activation, pre, dy))


@pytest.mark.parametrize("name", ["tma", "split_k"])
@pytest.mark.parametrize("activation", NAMES)
def test_epilogues_of_the_forward(activation: str, name: str) -> None:
    x, w, bias = torch.zeros(1, 32).bfloat16(), torch.zeros(16, 32).bfloat16(), torch.tensor(WIDE_PRE).bfloat16()
    with forced_config(CONFIGS[name]):
        same(fused_linear(x, w, bias, activation)[0], ACTIVATIONS[activation](bias.double()))


@pytest.mark.parametrize("name", ["pointer", "tma"])
@pytest.mark.parametrize("activation", NAMES)
def test_epilogue_with_the_derivative(activation: str, name: str) -> None:
    """linear_dact_kernel, where dy @ weight2 is one of the gradients in each row."""
    weight2, dy = torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(len(DY), 8, dtype=torch.bfloat16)
    weight2[0], dy[:, 0] = 1.0, torch.tensor(DY)
    pre = torch.tensor(WIDE_PRE).bfloat16().expand(len(DY), 16).contiguous()
    saved = pre.relu() if activation in SAVES_OUTPUT else pre
    with forced_config(CONFIGS[name]):
        dpre = REGISTRY["mlp"].bwd(dy, weight2, saved, None, activation, True, False, False, False)[0]
    same(dpre, exact(activation, pre, dy[:, :1].expand_as(pre)))


@pytest.mark.parametrize("name", ["pointer", "tma"])
def test_rows_beyond_the_last_add_nothing_to_a_bias_gradient(name: str) -> None:
    """A tile's rows beyond M are 0 in dy, and 0 times an infinite weight is NaN."""
    weight2 = torch.randn(8, 40).bfloat16()
    weight2[3, 5] = INF
    with forced_config(CONFIGS[name]):
        db = REGISTRY["mlp"].bwd(
            torch.rand(5, 8).bfloat16(), weight2, torch.rand(5, 40).bfloat16(), None, "gelu", True, True, False, False
        )[1]  # fmt: skip
    assert db[5] == INF
    assert db.isfinite().sum() == 39
