"""PyTorch itself: eager, checkpointed, compiled, scripted, and the fused entry points that it hides."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..modules import eager_module
from ..provider import Prepared, Provider, Unsupported, Workload, needs_cuda

SCRIPT_WARMUPS = 3


class Eager(Provider):
    """The eager baseline: the torch.nn.functional calls that users write today."""

    name = "eager"

    def available(self, device: str) -> str:
        return ""

    def prepare(self, work: Workload) -> Prepared:
        return Prepared(work.spec.torch_fn)


class Compile(Provider):
    """torch.compile of the same. Its own CUDA graphs are off: kernel time is taken from a graph of ours, for everybody."""

    def __init__(self, name: str, mode: str | None) -> None:
        self.name, self.mode = name, mode

    def available(self, device: str) -> str:
        if device.startswith("cuda"):
            return needs_cuda(device)
        return "" if self.mode is None else "max-autotune tunes GPU kernels"

    def prepare(self, work: Workload) -> Prepared:
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False  # or a backward cannot be repeated to be timed
        torch._dynamo.reset()
        compiled = torch.compile(work.spec.torch_fn, mode=self.mode, fullgraph=True, dynamic=False)
        return Prepared(compiled, f"mode={self.mode or 'default'}")


class Checkpoint(Provider):
    """Eager under torch.utils.checkpoint, the usual way to less memory: for MLPs, whose recompute option does the same."""

    name = "checkpoint"

    def available(self, device: str) -> str:
        return ""

    def prepare(self, work: Workload) -> Prepared:
        if work.op != "mlp" or work.pass_ != "fwd+bwd":
            raise Unsupported("an MLP's forward and backward together: what it saves is memory between the two")
        return Prepared(
            lambda *args: checkpoint(work.spec.torch_fn, *args, use_reentrant=False, preserve_rng_state=False),
            "use_reentrant=False",
        )


class TorchScript(Provider):
    """The eager baseline's module, scripted, in eval, frozen, and warmed up so that the fuser has specialised it."""

    name = "torchscript"

    def available(self, device: str) -> str:
        return ""

    def prepare(self, work: Workload) -> Prepared:
        work.inference_only("a frozen TorchScript module")
        module, x = eager_module(work)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what some deploy
            scripted = torch.jit.freeze(torch.jit.script(module.eval()))
            for _ in range(SCRIPT_WARMUPS):
                scripted(x)
            groups = fused_groups(scripted, x)
        said = f"TensorExprGroup={groups}" if groups else "not fused: no TensorExprGroup in its graph"
        return Prepared(lambda input, *_, **__: scripted(input), said)


def fused_groups(scripted: Any, x: Tensor) -> int:
    """The number of fused groups in the graph that TorchScript runs for x."""
    return sum(1 for node in scripted.graph_for(x).nodes() if node.kind() == "prim::TensorExprGroup")


class CublasLt(Provider):
    """cuBLASLt's epilogue through torch._addmm_activation: ReLU, and GELU, which on CUDA is the tanh approximation."""

    name = "cublaslt"

    def available(self, device: str) -> str:
        return needs_cuda(device)

    def prepare(self, work: Workload) -> Prepared:
        if work.op != "linear":
            raise Unsupported("a matmul epilogue")
        work.inference_only("the epilogue")
        activation = work.args[3]
        if activation not in ("relu", "gelu_tanh") or work.args[2] is None:
            raise Unsupported(f"the epilogue does relu and tanh-GELU with a bias, not {activation}")
        use_gelu = activation == "gelu_tanh"

        def call(x: Tensor, weight: Tensor, bias: Tensor, _: str) -> Tensor:
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=use_gelu)

        return Prepared(call)


class ScaledMM(Provider):
    """torch._scaled_mm, the fp8 product with row-wise scales and a bias, then the activation."""

    name = "scaled_mm"

    def available(self, device: str) -> str:
        if reason := needs_cuda(device):
            return reason
        capability = torch.cuda.get_device_capability()
        return "" if capability >= (8, 9) else f"fp8 needs compute capability 8.9, this is {capability[0]}.{capability[1]}"

    def prepare(self, work: Workload) -> Prepared:
        if work.op != "linear_fp8":
            raise Unsupported("fp8 products only")
        return Prepared(work.spec.bench.baselines["scaled_mm"], "activation apart")
