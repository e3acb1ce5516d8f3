"""The contract on sampled rows, which tests/gpu holds the largest products to: here on small ones, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops._torch.spec import REGISTRY
from fused_ops.ops.linear.cases.linear_fp8 import quantise
from tests.gpu.sampled import SAMPLE, hold_sampled, sample

M, N, K = 300, 144, 96


def arguments(op: str, activation: str = "gelu") -> tuple[Any, ...]:
    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * columns**-0.5

    x = torch.randn(M, K)
    if op == "linear_fp8":
        (q, scale), (w, w_scale) = quantise(x, True), quantise(weight(N, K), True)
        return q, w, scale, w_scale, torch.randn(N), activation, torch.float32
    return {
        "linear": (x, weight(N, K), torch.randn(N), activation),
        "gated_linear": (x, weight(N, K), weight(N, K), activation, torch.randn(N), torch.randn(N)),
        "mlp": (x, weight(N, K), torch.randn(N), weight(K, N), torch.randn(K), activation),
        "softmax": (x, -1),
        "layer_norm": (x, (K,), torch.randn(K), torch.randn(K)),
        "layer_norm_fp8": (x, (K,), torch.randn(K), torch.randn(K)),
    }[op]


@pytest.mark.parametrize("op", list(REGISTRY))
def test_what_is_right_passes(op: str) -> None:
    hold_sampled(REGISTRY[op], arguments(op), {})


@pytest.mark.parametrize(("op", "activation"), [("linear", None), ("linear", "relu"), ("mlp", "relu")])
def test_what_keeps_no_pre_activation_passes(op: str, activation: str | None) -> None:
    hold_sampled(REGISTRY[op], arguments(op, activation), {})  # type: ignore[arg-type]


def test_recomputing_passes() -> None:
    hold_sampled(REGISTRY["mlp"], arguments("mlp"), {"recompute": True})


class Corrupt(TorchDispatchMode):
    """One element of one output of one raw operator is wrong: that at a sampled row and column."""

    def __init__(self, op: Any, output: int) -> None:
        super().__init__()
        self.op, self.output, self.done = op, output, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.op:
            out = result[self.output] if isinstance(result, tuple) else result
            if out.numel():
                at = tuple(sample(size)[2] for size in out.shape)
                out[at] = out[at].float() + 2.0 * (1.0 + out[at].float().abs())
                self.done = True
        return result


WRONG = [
    *((name, "fwd", i) for name, count in (("linear", 2), ("gated_linear", 3), ("mlp", 3), ("softmax", 1), ("layer_norm", 3), ("linear_fp8", 1)) for i in range(count)),
    *((name, "bwd", i) for name, count in (("linear", 3), ("gated_linear", 5), ("mlp", 4), ("softmax", 1), ("layer_norm", 3)) for i in range(count)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "way", "output"), WRONG)
def test_one_wrong_element_is_noticed(op: str, way: str, output: int) -> None:
    spec = REGISTRY[op]
    with Corrupt(getattr(spec, way), output) as corrupt, pytest.raises(AssertionError, match=f"output {output}, sampled"):
        hold_sampled(spec, arguments(op), {})
    assert corrupt.done


@pytest.mark.parametrize("size", [1, 16, 300, 8192, 12608])
def test_the_sample_has_the_ends_and_the_edges_of_tiles(size: int) -> None:
    found = sample(size)
    assert found == sorted(set(found))
    assert len(found) == min(SAMPLE, size)
    assert {0, size - 1} <= set(found)
    assert size < 1000 or {127, 128, 255, 256, size - 128, size - 129} <= set(found)


def test_every_op_has_a_smaller_call() -> None:
    """So that no benchmark case of a new op is left out unseen."""
    assert {spec.name for spec in REGISTRY.values() if spec.trains} == {name for name, way, _ in WRONG if way == "bwd"}
