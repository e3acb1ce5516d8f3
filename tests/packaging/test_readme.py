"""What README.md says is so: its code runs, its table has every op, its commands and files exist."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import fused_ops
from fused_ops import REGISTRY
from fused_ops.ops.linear.activations import ACTIVATIONS
from tests import process
from tests.packaging.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_code_runs(tmp_path: Path) -> None:
    """All Python blocks, one after another, in a folder of their own."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    pytest.importorskip("tensorrt_rtx")
    out = process.output("\n".join(blocks), cwd=tmp_path)
    assert "2 of 2 candidates fused" in out
    assert "model.onnx by onnxruntime: ok" in out
    assert {"model.onnx", "model.engine", "model.pt"} <= {path.name for path in tmp_path.iterdir()}


def _signature(function: Callable[..., object]) -> str:
    """name(parameters with their defaults), without annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return f"{function.__name__}{inspect.Signature(parameters)}"


def test_table_has_every_op_with_its_signature() -> None:
    listed = re.findall(r"^\| `(fused_\w+\(.*?\))` \|", README, re.MULTILINE)
    missing = {_signature(spec.public) for spec in REGISTRY.values()} - set(listed)
    assert not missing
    assert all(_signature(getattr(fused_ops, text.split("(")[0])) == text for text in listed)


def test_activations() -> None:
    (text,) = re.findall(r"^Activations: (.*)\.$", README, re.MULTILINE)
    assert set(text.split(", ")) | {"none"} == set(ACTIVATIONS) | {"none"}


def test_commands_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^    )make (\w+)", README, re.MULTILINE))
    assert {"demo", "test", "help"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"\]\((\w[\w./]*)\)", README):
        assert (ROOT / name).exists(), name
