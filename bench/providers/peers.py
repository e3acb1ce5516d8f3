"""Other kernel libraries, each through its own public entry points, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..provider import Prepared, Provider, Unsupported, Workload, missing, needs_cuda

Table = dict[str, Callable[[Workload], Callable[..., Any]]]


class _Library(Provider):
    """A library whose entry points are looked up by op. module: what must import; table: op -> the call to measure."""

    module: str

    def available(self, device: str) -> str:
        return needs_cuda(device) or missing(self.module)

    def table(self) -> Table:
        raise NotImplementedError

    def prepare(self, work: Workload) -> Prepared:
        make = self.table().get(work.op)
        if make is None:
            raise Unsupported(f"{self.name} has no {work.op}")
        return Prepared(make(work), f"{self.module} {_version(self.module)}")


def _version(module: str) -> str:
    from ..environment import version

    return version({"quack": "quack-kernels"}.get(module, module.replace("_", "-"))) or "unknown version"


class Liger(_Library):
    """liger-kernel's functional interface."""

    name, module = "liger", "liger_kernel"

    def table(self) -> Table:
        f = importlib.import_module("liger_kernel.transformers.functional")
        return {
            "softmax": lambda w: lambda x, dim=-1, **_: f.liger_softmax(x),
            "layer_norm": lambda w: lambda x, shape, weight, bias, eps=1e-5: f.liger_layer_norm(x, weight, bias, eps),
        }


class Quack(_Library):
    """quack-kernels, written in CuTe DSL for Hopper and Blackwell."""

    name, module = "quack", "quack"

    def available(self, device: str) -> str:
        if reason := super().available(device):
            return reason
        major, minor = torch.cuda.get_device_capability()
        return "" if major >= 9 else f"quack needs compute capability 9.0, this is {major}.{minor}"

    def table(self) -> Table:
        quack = importlib.import_module("quack")
        return {
            "softmax": lambda w: lambda x, dim=-1, **_: quack.softmax(x),
            "layer_norm": _quack_layer_norm,
            "linear": _quack_linear,
            "mlp": _quack_mlp,
        }


def _quack_layer_norm(work: Workload) -> Callable[..., Tensor]:
    """quack's layernorm_fwd and layernorm_bwd, which want fp32 parameters: cast once, outside the timing."""
    rmsnorm = importlib.import_module("quack.rmsnorm")
    weight32, bias32 = (p.detach().float() if p is not None else None for p in work.args[2:4])

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
            y, rstd, mean = rmsnorm.layernorm_fwd(x, weight32, bias32, eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, rstd, mean = ctx.saved_tensors
            dx, dw, db = rmsnorm.layernorm_bwd(x, weight32, dy, rstd, mean, has_bias=bias32 is not None)
            return dx, dw.to(x.dtype), db.to(x.dtype) if db is not None else None, None

    if not work.trains:
        return lambda x, shape, weight, bias, eps=1e-5: rmsnorm.layernorm_fwd(x, weight32, bias32, eps)
    return lambda x, shape, weight, bias, eps=1e-5: LayerNorm.apply(x, weight, bias, eps)


_QUACK_ACTIVATIONS = {
    None: None, "relu": "relu", "gelu": "gelu_erf", "gelu_tanh": "gelu_tanh_approx", "silu": "silu", "relu2": "relu_sq",
}  # fmt: skip


def _quack_linear(work: Workload) -> Callable[..., Tensor]:
    """quack's tuned GEMM with activation; its training path exists only inside its MLP."""
    work.inference_only("quack's gemm_act")
    activation = work.args[3]
    if activation not in _QUACK_ACTIVATIONS:
        raise Unsupported(f"quack has no {activation}")
    gemm = importlib.import_module("quack.gemm_interface")
    name = _QUACK_ACTIVATIONS[activation]
    return lambda x, weight, bias, _: gemm.gemm_act(x, weight.t(), bias=bias, activation=name, store_preact=False)[1]


def _quack_mlp(work: Workload) -> Callable[..., Tensor]:
    mlp = importlib.import_module("quack.mlp")

    def call(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
        return mlp.mlp_func(x, w1, w2, _QUACK_ACTIVATIONS[activation], bias1=b1, bias2=b2)

    return call


class FlagGems(_Library):
    """flag-gems' ATen replacements, called directly; forward only, since its backward hooks in by the dispatcher."""

    name, module = "flag-gems", "flag_gems"

    def table(self) -> Table:
        gems = importlib.import_module("flag_gems")

        def inference(call: Callable[..., Any]) -> Callable[[Workload], Callable[..., Any]]:
            def make(work: Workload) -> Callable[..., Any]:
                work.inference_only("flag-gems called directly")
                return call

            return make

        return {
            "softmax": inference(lambda x, dim=-1, **_: gems.softmax(x, dim)),
            "layer_norm": inference(lambda x, shape, w, b, eps=1e-5: gems.layer_norm(x, list(shape), w, b, eps)[0]),
        }


class Helion(Provider):
    """helion's pretuned kernels. They are in its repository and not in its wheel: HELION_PRETUNED names the folder."""

    name = "helion"

    def available(self, device: str) -> str:
        if reason := needs_cuda(device) or missing("helion"):
            return reason
        folder = os.environ.get("HELION_PRETUNED", "")
        if not folder:
            return "HELION_PRETUNED does not name a checkout's pretuned_kernels folder (the wheel has none)"
        return "" if (Path(folder) / "softmax" / "softmax.py").exists() else f"no pretuned kernels in HELION_PRETUNED={folder}"

    def prepare(self, work: Workload) -> Prepared:
        work.inference_only("a pretuned helion kernel")
        if work.op not in ("softmax", "layer_norm"):
            raise Unsupported(f"helion has no pretuned {work.op}")
        folder = Path(os.environ["HELION_PRETUNED"]) / work.op
        major, minor = torch.cuda.get_device_capability()
        tuned = sorted(p.stem for p in folder.glob("_helion_aot_*_cuda_sm*.py"))
        spec = importlib.util.spec_from_file_location(f"helion_pretuned_{work.op}", folder / f"{work.op}.py")
        if spec is None or spec.loader is None:
            raise Unsupported(f"{folder} holds no module {work.op}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, work.op)
        call: Callable[..., Any] = {
            "softmax": lambda x, dim=-1, **_: kernel(x),
            "layer_norm": lambda x, shape, w, b, eps=1e-5: kernel(x, w, b),
        }[work.op]
        own = any(t.endswith(f"sm{major}{minor}") for t in tuned)
        return Prepared(call, "pretuned for this GPU" if own else f"pretuned for another GPU: {', '.join(tuned) or 'none'}")
