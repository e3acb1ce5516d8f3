"""Export a trained model to ONNX, TensorRT, TorchScript or AOTInductor; quantise it, and verify what was written.

    from fused_ops.export import export_onnx, verify

Importing this package loads neither onnx nor tensorrt: each name loads its module when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .files.atomic import ExportError

if TYPE_CHECKING:
    from .aoti import export_aoti
    from .onnx.exporter import export_onnx, export_submodule
    from .onnx.translation import custom_translation_table
    from .quantize.quantizer import quantize_onnx, sensitivity
    from .repository.writer import export_model_repository
    from .tensorrt.build import Engine, build_engine
    from .torchscript import export_torchscript
    from .verification.verifier import verify

_HOME = {
    "export_onnx": "onnx.exporter",
    "export_submodule": "onnx.exporter",
    "custom_translation_table": "onnx.translation",
    "verify": "verification.verifier",  # no module is called verify: its import would take the function's place
    "quantize_onnx": "quantize.quantizer",
    "sensitivity": "quantize.quantizer",
    "export_torchscript": "torchscript",
    "export_aoti": "aoti",
    "build_engine": "tensorrt.build",
    "Engine": "tensorrt.build",
    "export_model_repository": "repository.writer",
}

__all__ = [
    "Engine",
    "ExportError",
    "build_engine",
    "custom_translation_table",
    "export_aoti",
    "export_model_repository",
    "export_onnx",
    "export_submodule",
    "export_torchscript",
    "quantize_onnx",
    "sensitivity",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
