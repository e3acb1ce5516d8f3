"""Feed each file to the reader of ONNX that its folder is named after, one line of JSON each.

Run in a process of its own: native parsers may end it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fused_ops.export import ExportError, build_engine
from fused_ops.export.files.atomic import check_onnx
from fused_ops.export.inspect import inspect_file

SMALL = {"x": ((1, 1, 16), (2, 2, 16), (2, 4, 16))}


def infer(path: Path) -> None:
    """ONNX Runtime's parser, behind the same check; a file that passes the check may still be refused, by an exception."""
    import onnxruntime

    check_onnx(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime: {error}") from None


def build(path: Path) -> None:
    build_engine(path, path.with_suffix(".engine"), backend="tensorrt_rtx", profiles=SMALL, progress=False)


READERS: dict[str, Any] = {"build": build, "inspect": inspect_file, "infer": infer}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        reader = path.parent.name
        try:
            READERS[reader](path)
            outcome = "ok"
        except ExportError as error:
            outcome = f"ExportError: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps([reader, path.name, outcome]), flush=True)
