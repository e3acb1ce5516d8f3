"""Runtimes that serve an exported model: ONNX Runtime and TensorRT, on the ONNX file that our own export writes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modules import eager_module
from ..provider import Prepared, Provider, Unsupported, Workload, missing, needs_cuda

ORT_DTYPES = {torch.float32: np.float32, torch.float16: np.float16}


def export(module: torch.nn.Module, x: Any, folder: str) -> Path:
    """The module as ONNX by our export."""
    from fused_ops.export import export_onnx

    return export_onnx(module, x if isinstance(x, tuple) else (x,), Path(folder) / "model.onnx")


def ort_providers(device: str) -> list[str]:
    """ONNX Runtime's execution providers for the device."""
    return ["CUDAExecutionProvider"] if device.startswith("cuda") else ["CPUExecutionProvider"]


class OnnxRuntime(Provider):
    name = "onnxruntime"

    def available(self, device: str) -> str:
        if reason := missing("onnx", "onnxscript", "onnxruntime"):
            return reason
        import onnxruntime

        wanted = ort_providers(device)[0]
        return "" if wanted in onnxruntime.get_available_providers() else f"this onnxruntime has no {wanted}"

    def prepare(self, work: Workload) -> Prepared:
        work.inference_only("ONNX Runtime")
        if work.case.dtype not in ORT_DTYPES:
            raise Unsupported(f"ONNX Runtime is fed fp32 and fp16 here, not {work.case.dtype}")
        module, x = eager_module(work)
        with tempfile.TemporaryDirectory() as folder:
            session = ort_session(export(module, x, folder), work.device)
        y = torch.empty_like(module(x))
        return Prepared(
            lambda input, *_, **__: run_bound(session, input, y),
            ort_providers(work.device)[0],
            "it runs on a stream of its own",
        )


def ort_session(path: Path, device: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if device == "cpu":
        options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=ort_providers(device))


def run_bound(session: Any, x: Tensor, y: Tensor) -> Tensor:
    """Run with both ends bound to device memory, so that nothing is copied; y is written and returned."""
    binding = session.io_binding()
    for bind, value, tensor in (
        (binding.bind_input, session.get_inputs()[0], x),
        (binding.bind_output, session.get_outputs()[0], y),
    ):
        element = ORT_DTYPES[tensor.dtype]
        bind(value.name, tensor.device.type, tensor.device.index or 0, element, tuple(tensor.shape), tensor.data_ptr())
    session.run_with_iobinding(binding)
    return y


class TensorRT(Provider):
    """An engine from our ONNX export, run on torch's stream with torch's memory, so that it can be captured in a graph."""

    name = "tensorrt"

    def available(self, device: str) -> str:
        if reason := needs_cuda(device) or missing("onnx", "onnxscript"):
            return reason
        reasons = [missing(m) for m in ("tensorrt", "tensorrt_rtx")]
        return "" if "" in reasons else "; ".join(reasons)

    def prepare(self, work: Workload) -> Prepared:
        work.inference_only("TensorRT")
        from fused_ops.export import Engine, build_engine

        module, x = eager_module(work)
        with tempfile.TemporaryDirectory() as folder:
            path = export(module, x, folder)
            report = build_engine(path, Path(folder) / "model.engine", progress=False)
            engine = Engine.load(report.path, sha256=report.sha256)
        return Prepared(lambda input, *_, **__: next(iter(engine(input).values())), f"{report.backend} {report.version}")
