"""Other kernel libraries, each through its own public entry points, where it is installed: Liger, flag-gems, helion."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..provider import Prepared, Provider, Unsupported, Workload, limited, missing, needs_cuda
from . import library
from .library import Library, Table, affine, rehearse, rows_of, version_of, weighted
from .quack_kernels import Quack

__all__ = ["FlagGems", "Helion", "Liger", "Quack"]


class Liger(Library):
    """liger-kernel's functional interface."""

    name, module = "liger", "liger_kernel"
    longest_row = 65536

    def available(self, device: str) -> str:
        return needs_cuda(device) or missing("liger_kernel", "liger_kernel.transformers.functional")

    def table(self) -> Table:
        f = importlib.import_module("liger_kernel.transformers.functional")
        gates = {"silu": "liger_swiglu", "gelu_tanh": "liger_geglu"}

        def softmax(work: Workload) -> Callable[..., Tensor]:
            rows_of(work, "Liger's softmax", self.longest_row)
            return lambda input, dim=-1, **_: f.liger_softmax(input)

        def layer_norm(work: Workload) -> Callable[..., Tensor]:
            affine(work, "Liger's layer norm")
            if work.args[0].shape[-1] > self.longest_row:
                raise Unsupported(f"Liger's layer norm holds rows of at most {self.longest_row}")
            return lambda input, shape, weight, bias, eps=1e-5: f.liger_layer_norm(input, weight, bias, eps)

        def gated_linear(work: Workload) -> Callable[..., Tensor]:
            activation = work.args[3]
            if activation not in gates:
                raise Unsupported(f"Liger has no {activation} gate")
            if work.pass_ == "bwd":
                raise Unsupported("Liger's gate overwrites what it saved, so its backward cannot be repeated to be timed")
            gate = getattr(f, gates[activation])

            def call(
                input: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str,
                gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
            ) -> Tensor:  # fmt: skip
                return gate(F.linear(input, gate_weight, gate_bias), F.linear(input, up_weight, up_bias))

            return call

        def rms_norm(work: Workload) -> Callable[..., Tensor]:
            weighted(work, "Liger's RMS norm")
            return lambda input, shape, weight, eps=None: f.liger_rms_norm(
                input, weight, library.epsilon(input, eps), 0.0, "llama", False
            )

        return {"softmax": softmax, "layer_norm": layer_norm, "rms_norm": rms_norm, "gated_linear": gated_linear}


class FlagGems(Library):
    """flag-gems' ATen replacements, called directly: its own registration would replace everybody's operators."""

    name, module = "flag-gems", "flag_gems"

    def available(self, device: str) -> str:
        if reason := needs_cuda(device):
            return reason
        if "flag_gems" not in sys.modules and "FLAGGEMS_CACHE_DIR" not in os.environ:
            folder = tempfile.mkdtemp(prefix="flag-gems-")  # or its tuned configurations land in the user's home
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ["FLAGGEMS_CACHE_DIR"] = folder
        return missing("sqlalchemy", self.module)

    def table(self) -> Table:
        gems = importlib.import_module("flag_gems")
        return {"softmax": lambda work: _gems_softmax(work, gems), "layer_norm": lambda work: _gems_layer_norm(work, gems)}


def _gems_softmax(work: Workload, gems: ModuleType) -> Callable[..., Tensor]:
    rows_of(work, "flag-gems' softmax")

    class Softmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = gems.softmax(x, -1)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return gems.softmax_backward(dy, y, -1, y.dtype)

    if not work.trains:
        return lambda input, dim=-1, **_: gems.softmax(input, -1)
    return lambda input, dim=-1, **_: Softmax.apply(input)


def _gems_layer_norm(work: Workload, gems: ModuleType) -> Callable[..., Tensor]:
    affine(work, "flag-gems' layer norm")

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            y, mean, rstd = gems.layer_norm(x, shape, weight, bias, eps)
            ctx.save_for_backward(x, mean, rstd, weight, bias)
            ctx.shape = shape
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, mean, rstd, weight, bias = ctx.saved_tensors
            dx, dw, db = gems.layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias, [True, True, True])
            return dx, None, dw, db, None

    if not work.trains:
        return lambda input, shape, weight, bias, eps=1e-5: gems.layer_norm(input, list(shape), weight, bias, eps)[0]
    return lambda input, shape, weight, bias, eps=1e-5: LayerNorm.apply(input, list(shape), weight, bias, eps)


class Helion(Provider):
    """helion's pretuned kernels, which are in its repository and not in its wheel: `pretuned_kernels` there.

    HELION_PRETUNED names the folder, or it lies on sys.path under that name (bench/wheels.sh packs it from a checkout).
    Compiled for a configuration of its own choice, without them, helion would be measured below its worth; tuned here it
    takes minutes a shape.
    """

    name = "helion"

    def available(self, device: str) -> str:
        if reason := needs_cuda(device) or missing("helion"):
            return reason
        folder = pretuned_folder()
        if folder is None:
            return "no pretuned_kernels folder of a checkout: the wheel has none, HELION_PRETUNED may name one"
        return "" if (folder / "softmax" / "softmax.py").exists() else f"no pretuned kernels in {folder.name}"

    def prepare(self, work: Workload) -> Prepared:
        work.inference_only("a pretuned helion kernel")
        if work.op not in ("softmax", "layer_norm"):
            raise Unsupported(f"helion has no pretuned {work.op}")
        folder = pretuned_folder()
        assert folder is not None  # available() said so
        if work.op == "softmax":
            rows_of(work, "helion's softmax")
        else:
            affine(work, "helion's layer norm")
        major, minor = torch.cuda.get_device_capability()
        tuned = sorted(p.stem for p in (folder / work.op).glob("_helion_aot_*_cuda_sm*.py"))
        with limited(library.PREPARE_S, self.name):
            kernel = getattr(_load(folder / work.op / f"{work.op}.py"), work.op)
            calls: dict[str, Callable[..., Any]] = {
                "softmax": lambda input, dim=-1, **_: kernel(input),
                "layer_norm": lambda input, shape, weight, bias, eps=1e-5: kernel(input, weight, bias),
            }
            call = calls[work.op]
            rehearse(work, call)
        own = any(t.endswith(f"sm{major}{minor}") for t in tuned)
        whose = "this GPU" if own else f"another GPU: {', '.join(tuned) or 'none'}"
        return Prepared(call, f"helion {version_of('helion')}, pretuned for {whose}")


def pretuned_folder() -> Path | None:
    """Where helion's pretuned kernels are, or None."""
    named = os.environ.get("HELION_PRETUNED", "")
    places = [Path(named)] if named else [Path(p) / "pretuned_kernels" for p in sys.path]
    return next((p for p in places if p.is_dir()), None)


def _load(path: Path) -> ModuleType:
    """The module of a file, imported once."""
    name = f"helion_pretuned_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise Unsupported(f"{path} is no module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
