"""The wheel and the sdist: what is in them, and that an installed wheel works away from the checkout."""

from __future__ import annotations

import stat
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, checked

pytestmark = pytest.mark.xdist_group("distribution")


def _members(wheel: Path) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info for info in archive.infolist()}


def test_only_top_level_name_is_fused_ops(wheel: Path) -> None:
    """A top-level kernels/ in site-packages would overwrite Hugging Face's kernels, which transformers imports."""
    tops = {name.split("/")[0] for name in _members(wheel)}
    (dist_info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"fused_ops", dist_info}


@pytest.mark.parametrize("built", ["wheel", "wheel_from_sdist"])
def test_wheel_holds_every_source_as_a_real_file(built: str, request: pytest.FixtureRequest) -> None:
    """kernels/ and export/ reach the package through symbolic links; the wheel holds files, byte for byte."""
    wheel = request.getfixturevalue(built)
    members = _members(wheel)
    assert not [name for name, info in members.items() if stat.S_ISLNK(info.external_attr >> 16)]
    expected = {}
    for folder, home in (("fused_ops", "fused_ops"), ("kernels", "fused_ops/kernels"), ("export", "fused_ops/export")):
        for path in (request.getfixturevalue("sources") / folder).rglob("*.py"):
            relative = path.relative_to(request.getfixturevalue("sources") / folder).as_posix()
            if folder == "fused_ops" and relative.split("/")[0] in ("kernels", "export"):
                continue
            expected[f"{home}/{relative}"] = path.read_bytes()
    assert {"fused_ops/__init__.py", "fused_ops/kernels/softmax/softmax.py", "fused_ops/export/__init__.py"} <= expected.keys()
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name: archive.read(name) for name in members if name.endswith(".py")}
    assert sorted(shipped) == sorted(expected)
    assert shipped == expected
    assert "fused_ops/py.typed" in members


def test_wheel_and_wheel_from_sdist_agree(wheel: Path, wheel_from_sdist: Path) -> None:
    assert sorted(_members(wheel)) == sorted(_members(wheel_from_sdist))


def test_sdist_holds_licence_and_readme(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        outside = [m.name for m in archive.getmembers() if (m.issym() or m.islnk()) and ".." in Path(m.linkname).parts[1:]]
    assert {"LICENSE", "README.md", "pyproject.toml", "fused_ops/py.typed"} <= names
    assert not outside


def test_package_data_is_what_there_is(wheel: Path) -> None:
    """Every pattern of package data matches a file, and every data file in the package's own folders is shipped."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fused_ops"]
    assert all(list((ROOT / "fused_ops").glob(pattern)) for pattern in patterns)
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_ops").rglob("*.json")}
    assert data | {"fused_ops/py.typed"} <= set(_members(wheel))


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        (entry_points,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        assert "fused-ops = fused_ops.__main__:main" in archive.read(entry_points).decode()
    assert metadata["Name"] == "fused-ops"
    assert metadata["License-Expression"] == "Apache-2.0"
    base = sorted(r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r)
    assert [r.split("<")[0].split(">")[0].split(";")[0] for r in base] == ["numpy", "torch", "triton"]
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"onnx", "tensorrt", "tensorrt-rtx", "quantize", "bench", "cli", "demo", "dev"} <= extras


def test_installed_wheel_runs_an_op_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """Forward and backward of each family from the installed files, in a process whose folder is not the checkout."""
    program = """
import pathlib, sys, torch
import fused_ops
from fused_ops import fused_layernorm, fused_linear, fused_softmax
x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
w = torch.randn(4, 5, dtype=torch.float64)
y = fused_softmax(fused_linear(fused_layernorm(x, [5]), w, None, "relu"))
y.square().sum().backward()
z = torch.softmax(torch.relu(torch.nn.functional.layer_norm(x, [5]) @ w.T), -1)
(expected,) = torch.autograd.grad(z.square().sum(), x)
torch.testing.assert_close(y, z)
torch.testing.assert_close(x.grad, expected)
print(pathlib.Path(fused_ops.__file__).resolve())
"""
    out = checked(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(out.strip()) == (installed / "fused_ops" / "__init__.py").resolve()


def test_installed_wheel_interprets_its_kernels(installed: Path, tmp_path: Path) -> None:
    """The kernel files of the wheel load and run, not only the ATen path."""
    program = """
import torch, sys
from fused_ops import fused_layernorm
x = torch.randn(3, 37)
torch.testing.assert_close(fused_layernorm(x, [37]), torch.nn.functional.layer_norm(x, [37]))
print(sys.modules["fused_ops.kernels.norm.layer_norm"].__file__)
"""
    out = checked(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed), TRITON_INTERPRET="1")
    assert Path(out.strip()).resolve() == (installed / "fused_ops" / "kernels" / "norm" / "layer_norm.py").resolve()
