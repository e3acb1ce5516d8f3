"""The house: which room may import which, no circles, every module importable alone, and how long anything may be."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, checked
from tests.packaging.sources import Module, circles, files, imported_names, loaded, module_name, modules

# Inside fused_ops, from the ground up; a room may import those below it and its neighbours on one floor.
FLOORS = (
    ("kernels",),
    ("_runtime",),
    ("_torch",),
    ("ops",),
    ("nn", "testing", "_fuse"),
    ("_tools",),
    ("",),
    ("export", "__main__"),
)
FLAT_FILES = 10  # in fused_ops itself
FILE_LINES, OP_LINES, KERNEL_LINES = 400, 250, 70
LONGER: dict[str, str] = {}  # op file or kernel -> why it may be longer; at most MOST_LONGER
MOST_LONGER = 5


def _floor(module: str) -> int:
    """The floor of a module of fused_ops; the package itself, which imports the public names, is "" above its rooms."""
    room = module.split(".")[1] if "." in module else ""
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def _upstairs(module: Module) -> list[str]:
    """What module imports from a higher floor."""
    names = imported_names(module.path, module.source)
    inside = [name if name in modules() else name.rpartition(".")[0] for name in names if name.split(".")[0] == "fused_ops"]
    return sorted(name for name in inside if _floor(name) > _floor(module.name))


@pytest.mark.parametrize("room", [room for rooms in FLOORS for room in rooms])
def test_rooms_of_fused_ops_import_downstairs(room: str) -> None:
    inside = [m for m in modules().values() if m.name.split(".")[0] == "fused_ops" and (m.name.split(".") + [""])[1] == room]
    assert inside, f"no module in fused_ops/{room}"
    assert not {str(m.path): up for m in inside if (up := _upstairs(m))}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fused_ops/_runtime/a.py", "from .._torch.compile import is_traced"),
        ("fused_ops/_torch/a.py", "def f():\n    from ..ops.norm import layer_norm"),
        ("fused_ops/ops/norm/a.py", "from ... import nn"),
        ("fused_ops/_fuse/a.py", "from .._tools import explain"),
        ("fused_ops/_fuse/a.py", "import fused_ops"),
    ],
)
def test_an_import_upstairs_is_found(path: str, source: str) -> None:
    """The check itself, on imports it must refuse."""

    class Written(Module):
        source = ""  # type: ignore[assignment]

    module = Written(Path(path), module_name(Path(path)))
    Written.source = source  # type: ignore[assignment]
    assert _upstairs(module)


def test_no_import_circles() -> None:
    """Imports inside functions count, and so do the packages that an import loads on its way."""
    graph = {name: loaded(module, modules()) for name, module in modules().items()}
    assert sum(map(len, graph.values())) > 300
    assert not circles(graph)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


IMPORT_EACH_ALONE = """
import gc, importlib, json, os, sys, traceback
for name in json.loads(sys.argv[2]):  # what the project does not own is loaded once
    try:
        importlib.import_module(name)
    except ImportError:
        pass
gc.freeze()

def in_fork(function, *arguments):  # its result, which is JSON; a traceback where it raised
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = function(*arguments)
        except BaseException:
            said = traceback.format_exc()[-2000:]
        with os.fdopen(writing, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = json.load(pipe)
    os.waitpid(child, 0)
    return said

def load(name):
    importlib.import_module(name)

def below(package, names):  # importing any of them imports the package first: once for all of them
    if package == "bench":
        load("fused_ops")  # whose modules theirs import, and it before them
    load(package)
    gc.freeze()
    return {name: said for name in names if (said := in_fork(load, name))}

failed, packages = {}, {}
for name in json.loads(sys.argv[1]):
    packages.setdefault(name.split(".")[0], []).append(name)
for package, names in packages.items():
    said = in_fork(below, package, names)
    failed |= said if isinstance(said, dict) else {package: said}
print(json.dumps(failed))
"""
FOREIGN = (
    "torch",
    "torch._dynamo",
    "triton",
    "numpy",
    "onnx",
    "onnxruntime",
    "transformers",
    "typer",
    "rich",
    "pandas",
    "matplotlib.pyplot",
    "pytest",
)


def test_every_module_imports_alone(tmp_path: Path) -> None:
    """Each in a process in which no other module of the project was imported before."""
    arguments = (json.dumps(sorted(modules())), json.dumps(FOREIGN))
    out = checked(sys.executable, "-c", IMPORT_EACH_ALONE, *arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert json.loads(out.splitlines()[-1]) == {}


def test_a_module_that_does_not_import_alone_is_found(tmp_path: Path) -> None:
    (tmp_path / "first_of_two.py").write_text("from second_of_two import b\na = 1\n")
    (tmp_path / "second_of_two.py").write_text("from first_of_two import a\nb = 1\n")
    arguments = (json.dumps(["json", "json.decoder", "first_of_two"]), "[]")
    out = checked(sys.executable, "-c", IMPORT_EACH_ALONE, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert list(json.loads(out)) == ["first_of_two"]


def test_a_module_below_a_package_that_does_not_import_alone_is_found(tmp_path: Path) -> None:
    package = tmp_path / "pair"
    package.mkdir()
    for name, text in (("__init__", ""), ("good", ""), ("a", "from .b import x\ny = 1\n"), ("b", "from .a import y\nx = 1\n")):
        (package / f"{name}.py").write_text(text)
    arguments = (json.dumps(["pair", "pair.a", "pair.b", "pair.good"]), "[]")
    out = checked(sys.executable, "-c", IMPORT_EACH_ALONE, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert list(json.loads(out)) == ["pair.a", "pair.b"]


def test_few_files_are_flat_in_fused_ops() -> None:
    assert 0 < len(list((ROOT / "fused_ops").glob("*.py"))) <= FLAT_FILES


def test_no_file_is_long() -> None:
    tracked = [path for part in ("kernels", "fused_ops", "export", "bench", "tests") for path in files(part)]
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in tracked}
    assert not {path: n for path, n in lines.items() if n > FILE_LINES}
    ops = {path: n for path, n in lines.items() if path.startswith("fused_ops/ops/")}
    assert len(ops) > 20
    assert not {path: n for path, n in ops.items() if n > OP_LINES and path not in LONGER}


def _kernels(source: str) -> dict[str, int]:
    """Lines of each @triton.jit function, docstring included."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    jitted = [node for node in found if any("triton.jit" in ast.unparse(d) for d in node.decorator_list)]
    return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in jitted}


def test_no_kernel_is_long() -> None:
    lines = {name: n for path in files("kernels") for name, n in _kernels((ROOT / path).read_text()).items()}
    assert sum(name.endswith("_kernel") for name in lines) > 20
    assert not {name: n for name, n in lines.items() if n > KERNEL_LINES and name not in LONGER}


def test_exceptions_are_few_and_needed() -> None:
    assert len(LONGER) <= MOST_LONGER
    assert all(LONGER.values())
    lines = {name: n for path in files("kernels") for name, n in _kernels((ROOT / path).read_text()).items()}
    lines |= {str(path): len((ROOT / path).read_text().splitlines()) for path in files("fused_ops")}
    assert not [name for name in LONGER if lines.get(name, 0) <= (KERNEL_LINES if name.endswith("_kernel") else OP_LINES)]


def test_only_settings_read_the_environment() -> None:
    """Of fused_ops: one module says which variables there are."""
    reading = [str(path) for path in files("fused_ops") if "environ" in _names((ROOT / path).read_text())]
    assert reading == ["fused_ops/_runtime/settings.py"]


def _names(source: str) -> set[str]:
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Attribute, ast.Name))
    }


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Every folder that README draws exists, and it draws every room."""
    text = (ROOT / "README.md").read_text()
    drawn = set(re.findall(r"^ {4}(\S+)/ ", text.split("<!-- tree -->")[1], re.MULTILINE))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout: which folders are the repository's own is not known")
    folders = {str(folder) for name in listed for folder in Path(name).parents}
    rooms = {f for f in folders if f.split("/")[0] in ("fused_ops", "kernels", "export", "bench") and f.count("/") == 1}
    rooms -= {f for f in rooms if f.startswith(("bench/results", "fused_ops/configs"))}
    assert rooms <= drawn
    assert not [name for name in drawn if name not in folders]
