"""Outputs that appear whole or not at all, and hostile ONNX files that give one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import external_data_helper

from fused_ops.export import ExportError
from fused_ops.export.files.atomic import check_onnx, check_writable, output, require, sha256_of, write_bytes
from tests.export import onnx_files


def test_output_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with output("op", target) as staged:
        staged.write_bytes(b"new")
        (staged.parent / "a.bin.data").write_bytes(b"weights")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.bin.data"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fail(target: Path) -> None:
    with output("op", target) as staged:
        staged.write_bytes(b"half")
        raise KeyboardInterrupt


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = write_bytes("op", tmp_path / "a.bin", b"old")
    with pytest.raises(KeyboardInterrupt):
        _fail(target)
    with pytest.raises(ExportError, match="nothing was written"), output("op", target):
        pass
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    write_bytes("op", tmp_path / "link", b"new")
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("bad", ["", "missing/a.bin", "/proc/a.bin", "/dev/null"])
def test_paths_that_cannot_be_written(bad: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="op: path: got"):
        check_writable("op", tmp_path / bad)


def test_missing_package_names_the_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package is not installed; .* pip install 'fused-ops\[onnx\]'"):
        require("no_such_package.part", "onnx")


LAZY = """
import json, sys, fused_ops.export
from fused_ops.export import ExportError
said = {}
said["loaded"] = [m for m in ("onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "rich", "typer") if m in sys.modules]
said["dir"] = "verify" in dir(fused_ops.export)
import fused_ops.export.verification.verifier
said["callable"] = callable(fused_ops.export.verify)
assert "onnx" not in sys.modules
sys.modules["onnx"] = None
import torch
try:
    fused_ops.export.export_onnx(torch.nn.Linear(2, 2), (torch.randn(1, 2),), "m.onnx")
except ModuleNotFoundError as error:
    said["error"] = str(error)
from pathlib import Path
said["files"] = [str(path) for path in Path().iterdir()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process says that imports fused_ops.export, and then can import no onnx."""
    folder = tmp_path_factory.mktemp("fresh")
    result = subprocess.run([sys.executable, "-c", LAZY], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.xdist_group("export-fresh")
def test_without_onnx(fresh: dict[str, Any]) -> None:
    """Importing fused_ops.export needs no onnx; using export_onnx says what to install, before any work."""
    assert "pip install 'fused-ops[onnx]'" in fresh["error"]
    assert fresh["files"] == []


@pytest.mark.xdist_group("export-fresh")
def test_import_is_lazy(fresh: dict[str, Any]) -> None:
    assert fresh["loaded"] == []
    assert fresh["dir"]
    assert fresh["callable"]


def test_sha256(tmp_path: Path) -> None:
    write_bytes("op", tmp_path / "a", b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def external(tmp_path: Path, location: str, offset: int | None = None, length: int | None = None) -> Path:
    """linear_model with its weight in a file of 512 bytes, described as given."""
    model = onnx_files.linear_model()
    tensor = model.graph.initializer[0]
    data = bytes(tensor.raw_data)
    (tmp_path / "weights.data").write_bytes(data)
    external_data_helper.set_external_data(tensor, location, offset, length)
    tensor.ClearField("raw_data")
    path = tmp_path / "external.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_good_external_data(tmp_path: Path) -> None:
    assert check_onnx(external(tmp_path, "weights.data")).graph.name == "linear"
    assert check_onnx(external(tmp_path, "weights.data", 0, 512)).graph.name == "linear"


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("../weights.data", None, None),
        ("folder/../../weights.data", None, None),
        ("/etc/passwd", None, None),
        ("", None, None),
        ("link", None, None),
        ("link_folder/weights.data", None, None),
        ("missing.data", None, None),
        ("weights.data", -1, None),
        ("weights.data", 0, 513),
        ("weights.data", 512, 512),
        ("weights.data", 0, -1),
        ("weights.data", 0, 2**62),
        (".", None, None),
    ],
)
def test_hostile_external_data(location: str, offset: int | None, length: int | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "weights.data").write_bytes(bytes(512))  # what a traversal would find
    path = external(folder, location, offset, length)
    (folder / "link").symlink_to("weights.data")
    (folder / "link_folder").symlink_to("..")
    with pytest.raises(ExportError, match="external data location"):
        check_onnx(path)


def test_caps(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="allowed: 1 to 10 bytes"):
        check_onnx(onnx_files.save(onnx_files.linear_model(), tmp_path / "m.onnx"), max_bytes=10)
    with pytest.raises(ExportError, match="external data of 512 bytes, allowed: at most 100"):
        check_onnx(external(tmp_path, "weights.data"), max_external_bytes=100)


def test_invalid_graphs(tmp_path: Path) -> None:
    model = onnx_files.linear_model()
    model.graph.node[1].output[0] = "h"  # not SSA
    with pytest.raises(ExportError, match="is not valid ONNX"):
        check_onnx(onnx_files.save(model, tmp_path / "ssa.onnx"))
    model = onnx_files.linear_model()
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16  # full_check alone sees this
    with pytest.raises(ExportError, match="is not valid ONNX"):
        check_onnx(onnx_files.save(model, tmp_path / "types.onnx"))


FUZZ = """
import random, sys
from pathlib import Path
from fused_ops.export import ExportError
from fused_ops.export.files.atomic import check_onnx
data = Path("good.onnx").read_bytes()
random.seed(0)
refused = 0
for _ in range(600):
    bad = bytearray(data)
    for _ in range(random.choice((1, 2, 8, 64))):
        kind, at = random.random(), random.randrange(len(bad))
        if kind < 0.5:
            bad[at] = random.randrange(256)
        elif kind < 0.7:
            del bad[at : at + random.randrange(1, 40)]
        elif kind < 0.9:
            bad[at:at] = bad[at : at + random.randrange(1, 40)]
        else:
            del bad[at:]
        if not bad:
            bad = bytearray(1)
    Path("bad.onnx").write_bytes(bad)
    try:
        check_onnx("bad.onnx")
    except ExportError:
        refused += 1
print(refused)
"""


def test_fuzzed_bytes_never_crash(tmp_path: Path) -> None:
    """600 damaged files: each is valid ONNX still (damage inside a name or a weight), or one ExportError."""
    onnx_files.save(onnx_files.linear_model(), tmp_path / "good.onnx")
    result = subprocess.run(
        [sys.executable, "-c", FUZZ], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout) > 200
