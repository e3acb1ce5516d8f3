"""ONNX translations of the raw operators, for users who call torch.onnx.export themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..._torch.spec import REGISTRY
from ..files.atomic import ExportError, require


def custom_translation_table(opset: int = 20) -> dict[Any, Callable[..., Any]]:
    """The table for torch.onnx.export(model, args, dynamo=True, opset_version=opset, custom_translation_table=...).

    Maps the raw forward operator of each op that standard ONNX operators of that opset can say (softmax, layer_norm, linear)
    to them. Other families, and backward operators, go through ExportedProgram.run_decompositions, as export_onnx does for all.

    Raises:
        ExportError: an opset below 18.
        ModuleNotFoundError: onnxscript is not installed.
    """
    if opset < 18:
        raise ExportError(f"custom_translation_table: opset: got {opset}, allowed: 18 and above")
    # onnxscript has no name for the newest opsets (opset24): build the builder from the number
    builder = require("onnxscript.values", "onnx").Opset("", opset)
    return {op.fwd: _refusing(op.onnx(builder, opset)) for op in REGISTRY.values() if op.onnx is not None}


def _refusing(translation: Callable[..., Any]) -> Callable[..., Any]:
    """translation, with ExportError for what it cannot translate."""

    @functools.wraps(translation)  # torch.onnx reads its signature
    def refusing(*args: Any, **kwargs: Any) -> Any:
        try:
            return translation(*args, **kwargs)
        except ValueError as error:
            raise ExportError(str(error)) from error

    return refusing
