"""From a trained model to a file that serves: ONNX, TensorRT, TorchScript, AOTInductor, quantisation and verification.

    from fused_ops.export import export_onnx, verify

Importing this package loads neither onnx nor tensorrt: each name loads its module when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._files import ExportError

if TYPE_CHECKING:
    from ._translation import custom_translation_table
    from ._verify import verify
    from .aoti import export_aoti
    from .onnx import export_onnx, export_submodule
    from .quantize import quantize_onnx, sensitivity
    from .repository import export_model_repository
    from .tensorrt import Engine, build_engine
    from .torchscript import export_torchscript

_HOME = {
    "export_onnx": "onnx",
    "export_submodule": "onnx",
    "custom_translation_table": "_translation",
    "verify": "_verify",  # not verify.py: importing that submodule would put the module where the function belongs
    "quantize_onnx": "quantize",
    "sensitivity": "quantize",
    "export_torchscript": "torchscript",
    "export_aoti": "aoti",
    "build_engine": "tensorrt",
    "Engine": "tensorrt",
    "export_model_repository": "repository",
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
