"""FUSED_OPS_INLINE: AOTAutograd sees the Triton kernels. Only the tracing is tested here; running them needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fused_ops import fused_layernorm, fused_linear, fused_softmax
from fused_ops._runtime import settings
from fused_ops._runtime.compiled import Planned
from fused_ops._runtime.launch import launch
from fused_ops._torch import compile
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import forced
from tests.torch.calls import raw_operators

triton = pytest.importorskip("triton")


class NotRunError(Exception):
    """Raised in place of running a graph of GPU kernels."""


def graph_of(function: Any, *args: Any, dynamic: bool = False) -> torch.fx.GraphModule:
    """The first graph that AOTAutograd hands to the compiler; it is not run."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        def stop(*_: Any) -> Any:
            raise NotRunError

        graphs.append(graph)
        return stop

    if dynamic:
        torch._dynamo.mark_dynamic(args[0], 0)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    with pytest.raises(NotRunError):
        torch.compile(function, fullgraph=True, backend=backend)(*args)
    return graphs[0]


def targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's analysis of what a kernel writes asks for the current GPU's architecture."""
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    monkeypatch.setattr(compile, "_inlines", lambda types, args: True)


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    ("function", "args"),
    [
        pytest.param(lambda x, w: fused_layernorm(x, (128,), w), (bf16(64, 128), bf16(128)), id="layer_norm"),
        pytest.param(fused_softmax, (bf16(64, 128),), id="softmax"),
        pytest.param(lambda x, w: fused_linear(x, w, None, "gelu"), (bf16(64, 128), bf16(256, 128)), id="linear"),
    ],
)
def test_the_graph_holds_kernels(function: Any, args: Any) -> None:
    for needs in (False, True):
        graph = graph_of(function, *(a.clone().requires_grad_(needs) for a in args))
        assert "triton_kernel_wrapper_functional" in targets(graph)
        assert raw_operators(graph) == set()


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_cluster_stays_opaque() -> None:
    """torch takes no num_ctas into a graph: the operator is called, which launches the cluster itself."""
    with forced("softmax_fwd", RowConfig(1, 128, 1, num_ctas=2)):
        assert raw_operators(graph_of(fused_softmax, bf16(64, 128))) == {"fused_ops.softmax_fwd.default"}


def test_off_unless_asked_for_and_never_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = bf16(4, 8)
    opaque = {"fused_ops.softmax_fwd.default"}
    assert not settings.INLINE
    assert raw_operators(graph_of(fused_softmax, x)) == opaque
    monkeypatch.setattr(settings, "INLINE", True)
    assert raw_operators(graph_of(fused_softmax, x)) == opaque


def test_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides, on stand-ins for CUDA tensors: the dtype, known sizes, and torch's own switch."""

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(settings, "INLINE", True)
    monkeypatch.setattr(compile, "chosen", lambda _: ("triton", ""))
    x = bf16(4, 8).as_subclass(OnGpu)
    assert compile._inlines((Tensor,), (x, 1, None))
    assert not compile._inlines((OnGpu,), (x, 1, None))
    assert not compile._inlines((Tensor,), (x.double(), 1, None))
    with torch._functorch.config.patch(decompose_custom_triton_ops=False):
        assert not compile._inlines((Tensor,), (x, 1, None))
    monkeypatch.setattr(compile, "chosen", lambda _: ("aten", ""))
    assert not compile._inlines((Tensor,), (x, 1, None))


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_launch_that_cannot_be_traced_stays_opaque(caplog: pytest.LogCaptureFixture) -> None:
    library = torch.library.Library("fused_ops", "FRAGMENT")

    def fails(x: Tensor) -> Tensor:
        launch(Planned(0, object(), {}), 1, x)
        return x.clone()

    library.define("inline_test(Tensor x) -> Tensor")
    library.impl("inline_test", torch.clone, "CompositeExplicitAutograd")
    torch.library.register_fake("fused_ops::inline_test", torch.clone, lib=library)
    compile.register_inlining(library, "inline_test", fails)
    with caplog.at_level("DEBUG", logger="fused_ops"):
        graph = graph_of(lambda x: torch.ops.fused_ops.inline_test(x), bf16(4, 8))
    assert raw_operators(graph) == {"fused_ops.inline_test.default"}
    assert any("inline_test is not inlined" in record.getMessage() for record in caplog.records)
