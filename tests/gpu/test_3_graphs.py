"""CUDA graphs: capture, write new numbers into the inputs, replay: the outputs are those of an eager call on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract import cases, sample_of
from tests.gpu.hold import on_gpu

pytestmark = pytest.mark.gpu


FIRST = [case for case in cases([torch.bfloat16]) if "first" in sample_of(*case.values)[1].tags]


@pytest.mark.parametrize(("name", "dtype", "index"), FIRST)
def test_replay_on_new_inputs(name: str, dtype: torch.dtype, index: int) -> None:
    spec, sample = sample_of(name, dtype, index)
    args = [_leaf(on_gpu(a)) for a in sample.args]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def run() -> list[Tensor]:
        out = spec.public(*args, **sample.kwargs)
        outs = [o for o in ((out,) if isinstance(out, Tensor) else out) if o.requires_grad]
        grads = torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs]) if outs and wanted else ()
        return [*(o.detach() for o in outs), *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            for leaf in wanted:
                if leaf.numel() and 0 not in leaf.stride():  # an expanded tensor cannot be written in place
                    leaf.copy_(torch.randn(leaf.shape, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(captured, run()):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
