"""export_aoti: a compiled package that runs at other shapes in a process without fused_ops."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_ops.export import ExportError, export_aoti, verify
from tests.export import models


@pytest.mark.slow
def test_package_runs_without_fused_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "out"
    folder.mkdir()
    model, path = models.make("decoder"), folder / "model.pt2"
    export_aoti(model, (models.example(2, 5),), path, dynamic_shapes=models.DYNAMIC)
    assert sorted(p.name for p in folder.iterdir()) == ["model.pt2", "model.pt2.manifest.json"]
    report = verify(path, model, [models.example(2, 2), models.example(3, 7)], max_relative_error=1e-5)
    assert report.ok, str(report)
    assert report.runtime == "aoti"

    x = models.example(4, 9)
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import torch
y = torch._inductor.aoti_load_package({str(path)!r})(torch.load("x.pt", weights_only=True))
torch.save(y, "y.pt")
"""
    models.without_fused_ops(code, tmp_path)
    got = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = models.make("mlp"), (models.example(),)
    with pytest.raises(ExportError, match=r"path: got 'model\.so', allowed: a name that ends in '\.pt2'"):
        export_aoti(model, x, tmp_path / "model.so")
    with pytest.raises(ExportError, match="export_aoti: path: got"):
        export_aoti(model, x, tmp_path / "missing" / "model.pt2")
    with pytest.raises(TypeError, match="model: got str"):
        export_aoti("mlp", x, tmp_path / "model.pt2")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"export_aoti: torch\.export cannot trace"):
        export_aoti(model, (torch.randn(2, 3),), tmp_path / "model.pt2")
    (tmp_path / "model.pt2").write_bytes(b"old")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", broken)
    with pytest.raises(ExportError, match="AOTInductor cannot compile the model: no compiler"):
        export_aoti(nn.Linear(2, 2), (torch.randn(1, 2),), tmp_path / "model.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"old"
