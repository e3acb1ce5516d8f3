"""What `import fused_ops` costs and what it loads."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, checked

HEAVY = (
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "typer",
    "rich",
    "pandas",
    "matplotlib",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "fused_ops.kernels",
    "fused_ops.export",
)
ALLOWED_SECONDS = 0.3
RUNS = 5


def _modules_after(statement: str, cwd: Path) -> set[str]:
    program = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(checked(sys.executable, "-c", program, cwd=cwd, PYTHONPATH=str(ROOT))))


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    added = _modules_after("import torch, fused_ops", tmp_path) - _modules_after("import torch", tmp_path)
    assert "fused_ops" in added
    assert not sorted(m for m in added for heavy in HEAVY if m == heavy or m.startswith(heavy + "."))


def test_export_package_loads_nothing_heavy(tmp_path: Path) -> None:
    """fused_ops.export itself too: its names load their modules when first used."""
    added = _modules_after("import torch, fused_ops.export", tmp_path) - _modules_after("import torch", tmp_path)
    heavy = [name for name in HEAVY if name != "fused_ops.export"]
    assert "fused_ops.export" in added
    assert not sorted(m for m in added for name in heavy if m == name or m.startswith(name + "."))


@pytest.mark.parametrize(
    "hidden", [("triton",), ("onnx", "onnxruntime", "onnxscript"), ("tensorrt", "tensorrt_rtx"), ("rich", "typer")]
)
def test_ops_work_without(hidden: tuple[str, ...], tmp_path: Path) -> None:
    """No optional package, and not even triton, is needed to import and to run on the CPU."""
    program = f"""
import sys
for name in {hidden!r}:
    sys.modules[name] = None
import torch
from fused_ops import fused_layernorm
print(fused_layernorm(torch.ones(2, 3), [3]).abs().max().item())
"""
    assert float(checked(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))) == 0.0


def test_import_time_over_torch(tmp_path: Path) -> None:
    """At most 0.3 s more than torch's own import: processor time, which other work on the machine does not lengthen."""
    program = "import time, torch; start = time.process_time(); import fused_ops; print(time.process_time() - start)"
    seconds = [float(checked(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))) for _ in range(RUNS)]
    assert statistics.median(seconds) <= ALLOWED_SECONDS, seconds
