"""The same providers for a whole model: each takes an unfused torch.nn module and gives back a function of its input."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..provider import Unsupported, missing, needs_cuda
from .deployed import TensorRT, export, ort_session
from .torch_native import Compile, TorchScript, fused_groups

Run = Callable[[Tensor], Tensor]


class ModelProvider:
    """A provider for whole models. name and role are as for an op's provider.

    prepare: gets a copy of the module, which it may change, and an input; returns the function to time and a configuration.
    tier: providers of a lower tier are ready sooner, and are measured on every case before those of the next.
    """

    def __init__(
        self, name: str, prepare: Callable[[nn.Module, Tensor], tuple[Run, str]], available: Callable[[str], str],
        trains: bool = False, tier: int = 0,
    ) -> None:  # fmt: skip
        self.name, self._prepare, self.available, self.trains, self.tier = name, prepare, available, trains, tier
        self.role = "ours" if name.startswith("ours") else "peer"

    def prepare(self, model: nn.Module, x: Tensor, training: bool) -> tuple[nn.Module, Run, str]:
        """(the module whose parameters train, the function to time, the configuration)."""
        if training and not self.trains:
            raise Unsupported(f"{self.name} runs inference only")
        own = copy.deepcopy(model).train(training)
        run, said = self._prepare(own, x)
        return own, run, said


def _always(_: str) -> str:
    return ""


def _eager(model: nn.Module, _: Tensor) -> tuple[Run, str]:
    return model, ""


def _fused(model: nn.Module, _: Tensor) -> tuple[Run, str]:
    from fused_ops import fuse

    report = fuse(model)
    return model, f"{len(report.fused)} of {len(report)} candidates fused"


def _compiled(mode: str | None, fused: bool) -> Callable[[nn.Module, Tensor], tuple[Run, str]]:
    def prepare(model: nn.Module, x: Tensor) -> tuple[Run, str]:
        said = _fused(model, x)[1] + "; " if fused else ""
        torch._dynamo.reset()
        return torch.compile(model, mode=mode, fullgraph=True, dynamic=False), f"{said}mode={mode or 'default'}"

    return prepare


def _scripted(model: nn.Module, x: Tensor) -> tuple[Run, str]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        scripted = torch.jit.freeze(torch.jit.script(model.eval()))
        for _ in range(3):
            scripted(x)
        return scripted, f"TensorExprGroup={fused_groups(scripted, x)}"


def _onnxruntime(model: nn.Module, x: Tensor) -> tuple[Run, str]:
    with tempfile.TemporaryDirectory() as folder:
        session = ort_session(export(model, x, folder), x.device.type)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), "our ONNX export"


def _aoti(model: nn.Module, x: Tensor) -> tuple[Run, str]:
    from fused_ops.export import export_aoti

    with tempfile.TemporaryDirectory() as folder:
        loaded = torch._inductor.aoti_load_package(str(export_aoti(model, (x,), Path(folder) / "model.pt2")))
    return lambda x: _first(loaded(x)), "our AOTInductor package"


def _tensorrt(model: nn.Module, x: Tensor) -> tuple[Run, str]:
    from fused_ops.export import Engine, build_engine

    with tempfile.TemporaryDirectory() as folder:
        report = build_engine(export(model, x, folder), Path(folder) / "model.engine", progress=False)
        context = Engine.load(report.path, sha256=report.sha256)
    return lambda x: _first(list(context(x).values())), f"{report.backend} {report.version}; our ONNX export"


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _onnxruntime_available(device: str) -> str:
    if device.startswith("cuda"):
        return "measured on the CPU only: copies to and from the host would be timed"
    return missing("onnx", "onnxscript", "onnxruntime")


def _ours_available(device: str) -> str:
    import fused_ops

    return "" if hasattr(fused_ops, "fuse") else "this fused_ops has no fuse()"


MODEL_PROVIDERS: tuple[ModelProvider, ...] = (
    ModelProvider("eager", _eager, _always, trains=True),
    ModelProvider("torchscript", _scripted, TorchScript().available),
    ModelProvider("compile", _compiled(None, False), Compile("compile", None).available, trains=True, tier=1),
    ModelProvider("onnxruntime", _onnxruntime, _onnxruntime_available),
    ModelProvider("aotinductor", _aoti, _always, tier=2),
    ModelProvider("tensorrt", _tensorrt, TensorRT().available),
    ModelProvider("ours", _fused, _ours_available, trains=True),
    ModelProvider("ours+compile", _compiled(None, True), lambda d: needs_cuda(d) or _ours_available(d), trains=True, tier=1),
    ModelProvider("compile-max-autotune", _compiled("max-autotune-no-cudagraphs", False), needs_cuda, trains=True, tier=3),
)
