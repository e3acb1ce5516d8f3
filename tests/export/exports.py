"""ONNX files of the shared models, each made once in a process, and the groups that keep their tests together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops.export import export_onnx
from fused_ops.export.onnx import exporter
from tests.export import models

LATE = {"precision", "keep_fp32", "keep_io_types", "output_names"}  # what export_onnx reads after the translation


def grouped(name: str, *values: Any, marks: Any = ()) -> Any:
    """Parameters of a test that reads a file of this model: such tests run in one process."""
    return pytest.param(name, *values, marks=[pytest.mark.xdist_group(f"export-{name}"), *marks])


NAMES = [grouped(name) for name in ("mlp", "decoder", "vit")]


class Exports:
    """Gives (model, path) of an export. Only read them: other tests get the same ones.

    A model is traced and translated once, by its first export, and each further one starts from a copy of the
    translation, which its options come after.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[tuple[str, bool], nn.Module] = {}
        self.files: dict[str, Path] = {}
        self.steps: dict[tuple[str, bool, bool], dict[str, Any]] = {}

    def __call__(self, name: str, fused: bool = True, *, dynamic: bool = True, **options: Any) -> tuple[nn.Module, Path]:
        assert options.keys() <= LATE
        options = {"precision": "fp32"} | options
        key = repr((name, fused, dynamic, sorted(options.items())))
        with torch.random.fork_rng(devices=[]):  # the test draws the same numbers whether or not the file is there
            torch.manual_seed(0)
            if (name, fused) not in self.models:
                self.models[name, fused] = models.make(name, fused)
            if key not in self.files:
                self.files[key] = self._export(name, fused, dynamic, options)
        return self.models[name, fused], self.files[key]

    def _export(self, name: str, fused: bool, dynamic: bool, options: dict[str, Any]) -> Path:
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        done = self.steps.setdefault((name, fused, dynamic), {})
        with pytest.MonkeyPatch.context() as patch:
            for step in ("exported_program", "_translate"):
                patch.setattr(exporter, step, _once(getattr(exporter, step), done, step))
            shapes = models.DYNAMIC if dynamic else None
            return export_onnx(
                self.models[name, fused], (models.example(),), folder / "model.onnx", dynamic_shapes=shapes, **options
            )


def _once(function: Callable[..., Any], done: dict[str, Any], step: str) -> Callable[..., Any]:
    """The function, called the first time only. A translation is copied, because export_onnx changes it."""

    def first(*args: Any) -> Any:
        if step not in done:
            done[step] = function(*args)
        return done[step].clone() if step == "_translate" else done[step]

    return first
