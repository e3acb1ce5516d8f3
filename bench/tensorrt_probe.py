"""The tensorrt probe: build an engine with TensorRT for RTX, check its validity, run it on this GPU, and print each result."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from .provider import missing


def main() -> int:
    if not torch.cuda.is_available():
        print("tensorrt probe: needs a CUDA device")
        return 2
    if reason := missing("onnx", "onnxscript", "tensorrt_rtx"):
        print(f"tensorrt probe: not run: {reason}")
        return 0
    import tensorrt_rtx

    from fused_ops.export import Engine, build_engine, export_onnx

    capability = ".".join(str(n) for n in torch.cuda.get_device_capability())
    gpu = f"{torch.cuda.get_device_name()}, compute capability {capability}"
    print(f"tensorrt probe: tensorrt_rtx {tensorrt_rtx.__version__} on {gpu}")
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)).eval()
    x = torch.randn(8, 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx = export_onnx(module, (x,), folder / "m.onnx")
        for target in ((), "current"):
            said = f"tensorrt probe: compute_capability={target or 'default'}"
            try:
                report = build_engine(
                    onnx, folder / "m.engine", backend="tensorrt_rtx", compute_capability=target, progress=False
                )
                print(f"{said}: built {report.bytes} bytes")
                _validity(tensorrt_rtx, report.path)
                with Engine.load(report.path, sha256=report.sha256) as engine:
                    y = next(iter(engine(x.cuda()).values()))
                error = (y.cpu() - module(x)).abs().max().item()
                print(f"{said}: ran, largest difference from torch {error:.3g}")
            except Exception as error:
                print(f"{said}: {type(error).__name__}: {error}")
    return 0


def _validity(tensorrt_rtx: object, path: Path) -> None:
    runtime = tensorrt_rtx.Runtime(tensorrt_rtx.Logger(tensorrt_rtx.Logger.WARNING))  # type: ignore[attr-defined]
    print(f"tensorrt probe: get_engine_validity: {runtime.get_engine_validity(path.read_bytes())}")


if __name__ == "__main__":
    sys.exit(main())
