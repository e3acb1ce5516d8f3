"""Every path that a command or a public function takes, naming what is no regular file: refused at once, in one line."""

from __future__ import annotations

import inspect
import json
import shutil
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import fused_ops.export as public
from fused_ops.export import ExportError
from fused_ops.export.cli import app
from fused_ops.export.files import atomic, manifest
from fused_ops.export.files.pt2 import load_program
from fused_ops.export.inspect import inspect_file
from tests.export.onnx_files import linear_model, save
from tests.special_files import KINDS, not_waiting

MODEL = ["--model", "torch.nn:Identity", "--input", "input=float32[batch:2,16]"]
QUANTIZE = ["-o", "out.onnx", "--calibration", "good.npz"]
ENGINE = ["export", "engine", "--onnx", "good.onnx", "--saveEngine", "out.engine"]
REPOSITORY = ["--root", "models", "--name", "m"]
# (command, parameter) -> a call whose other arguments are right; @ is where the path goes.
COMMANDS: dict[tuple[str, str], list[str]] = {
    ("verify", "path"): ["verify", "@", *MODEL],
    ("verify", "hf"): ["verify", "good.onnx", "--hf", "@"],
    ("quantize", "path"): ["quantize", "@", *QUANTIZE],
    ("quantize", "output"): ["quantize", "good.onnx", *QUANTIZE, "-o", "@"],
    ("quantize", "calibration"): ["quantize", "good.onnx", *QUANTIZE, "--calibration", "@"],
    ("quantize", "text"): ["quantize", "good.onnx", "-o", "out.onnx", "--hf", "tokens", "--text", "@"],
    ("quantize", "hf"): ["quantize", "good.onnx", "-o", "out.onnx", "--text", "good.txt", "--hf", "@"],
    ("inspect", "path"): ["inspect", "@"],
    ("export onnx", "output"): ["export", "onnx", *MODEL, "-o", "@"],
    ("export onnx", "hf"): ["export", "onnx", "-o", "out.onnx", "--hf", "@"],
    ("export onnx", "program"): ["export", "onnx", "-o", "out.onnx", "--program", "@"],
    ("export engine", "onnx"): [*ENGINE, "--onnx", "@"],
    ("export engine", "save"): [*ENGINE, "--saveEngine", "@"],
    ("export engine", "cache"): [*ENGINE, "--timingCacheFile", "@"],
    ("export engine", "layers"): [*ENGINE, "--exportLayerInfo", "@"],
    ("export torchscript", "output"): ["export", "torchscript", *MODEL, "-o", "@"],
    ("export torchscript", "hf"): ["export", "torchscript", "-o", "out.pt", "--hf", "@"],
    ("export aoti", "output"): ["export", "aoti", *MODEL, "-o", "@"],
    ("export aoti", "hf"): ["export", "aoti", "-o", "out.pt2", "--hf", "@"],
    ("export aoti", "program"): ["export", "aoti", "-o", "out.pt2", "--program", "@"],
    ("export repository", "artefact"): ["export", "repository", "@", *REPOSITORY],
    ("export repository", "root"): ["export", "repository", "good.onnx", *REPOSITORY, "--root", "@"],
}
WRITTEN = ("output", "save", "cache", "layers", "out", "engine_path", "timing_cache")  # may be empty files
SUFFIXES = ("", ".onnx", ".pt", ".pt2", ".engine")
TOKENS = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with good files for the other arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save(linear_model(), Path("good.onnx"))
    np.savez("good.npz", x=np.ones((1, 2, 16), np.float32))
    Path("good.txt").write_text("a\n")
    Path("tokens").mkdir()
    Path("tokens", "tokenizer.json").write_text(json.dumps(TOKENS | {"added_tokens": []}))


def made(kind: str, path: Path) -> Path:
    """What is no good file, at path: one of KINDS, or an empty one."""
    Path.touch(path) if kind == "empty file" else KINDS[kind](path)
    return path


def _takes_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_takes_path, typing.get_args(annotation)))


def _commands(of: typer.Typer, before: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in of.registered_commands:
        assert command.callback is not None
        yield before + (command.name or command.callback.__name__), command.callback
    for group in of.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        yield from _commands(group.typer_instance, f"{before}{group.name} ")


def test_every_path_of_every_command_is_tried() -> None:
    found = {
        (name, parameter) for name, callback in _commands(app)
        for parameter, hint in typing.get_type_hints(callback).items() if _takes_path(hint)
    }  # fmt: skip
    assert found == set(COMMANDS)


@pytest.mark.parametrize(("command", "parameter"), COMMANDS)
def test_a_command_refuses_what_is_no_regular_file(command: str, parameter: str, tmp_path: Path) -> None:
    if parameter == "hf" and command != "quantize":
        pytest.importorskip("transformers")
    if parameter == "text" or (command, parameter) == ("quantize", "hf"):
        pytest.importorskip("tokenizers")
    before = {path.name for path in tmp_path.iterdir()}
    for kind in (*KINDS, "empty file"):
        if (parameter, kind) == ("root", "folder") or (parameter in WRITTEN and kind == "empty file"):
            continue  # as they should be
        for suffix in SUFFIXES if parameter in ("path", "artefact") and kind == "FIFO" else SUFFIXES[:1]:
            special = made(kind, tmp_path / f"special{kind[:3]}{suffix}")
            arguments = [str(special) if part == "@" else part for part in COMMANDS[command, parameter]]
            with not_waiting():
                done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 2, (kind, suffix, done.output, done.exception)
            assert isinstance(done.exception, SystemExit), (kind, suffix, done.exception)
            assert done.output.startswith(f"fused-ops {command}: "), done.output
            assert done.output.count("\n") == 1, done.output
            assert special.name in done.output
            assert (
                kind not in ("FIFO", "socket") or parameter in (*WRITTEN, "hf", "root") or f"a {kind}, allowed" in done.output
            )
            shutil.rmtree(special) if kind == "folder" else special.unlink()
            Path(f"{special}.fifo").unlink(missing_ok=True)
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing was written"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "further"])
def test_every_file_of_a_hugging_face_folder_is_looked_at(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    for kind in [kind for kind in KINDS if kind != "folder"]:
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert"}')
        (folder / name).unlink(missing_ok=True)
        made(kind, folder / name)
        with not_waiting():
            done = CliRunner().invoke(app, ["export", "onnx", "-o", "out.onnx", "--hf", str(folder)])
        assert done.exit_code == 2
        assert isinstance(done.exception, SystemExit), done.exception
        assert f"{name}', a" in done.output
        shutil.rmtree(folder)


IDENTITY, X = torch.nn.Identity(), torch.ones(2, 16)
BATCH = [{"x": np.ones((1, 2, 16), np.float32)}]


def _engine(**parts: Any) -> Any:
    """An engine that nothing has loaded, for the methods that read files."""
    engine = object.__new__(public.Engine)
    vars(engine).update(closed=False, **parts)
    return engine


class _Cache:
    def create_runtime_config(self) -> Any:
        return self

    create_runtime_cache = create_runtime_config

    def deserialize(self, data: bytes) -> None:
        raise AssertionError(f"got {data!r}")


# (public name, parameter) -> a call with the path
FUNCTIONS: dict[tuple[str, str], Callable[[Path], Any]] = {
    ("export_onnx", "path"): lambda path: public.export_onnx(IDENTITY, (X,), path),
    ("export_submodule", "path"): lambda path: public.export_submodule(torch.nn.Sequential(IDENTITY), "0", (X,), path),
    ("export_torchscript", "path"): lambda path: public.export_torchscript(IDENTITY, (X,), path),
    ("export_aoti", "path"): lambda path: public.export_aoti(IDENTITY, (X,), path),
    ("verify", "path"): lambda path: public.verify(path, IDENTITY, (X,)),
    ("quantize_onnx", "path"): lambda path: public.quantize_onnx(path, "out.onnx", BATCH),
    ("quantize_onnx", "out"): lambda path: public.quantize_onnx("good.onnx", path, BATCH),
    ("sensitivity", "path"): lambda path: public.sensitivity(path, BATCH),
    ("build_engine", "onnx_path"): lambda path: public.build_engine(path, "out.engine"),
    ("build_engine", "engine_path"): lambda path: public.build_engine("good.onnx", path),
    ("build_engine", "timing_cache"): lambda path: public.build_engine("good.onnx", "out.engine", timing_cache=path),
    ("export_model_repository", "root"): lambda path: public.export_model_repository(path, "m", "good.onnx"),
    ("export_model_repository", "artefact"): lambda path: public.export_model_repository("models", "m", path),
    ("Engine.load", "path"): lambda path: public.Engine.load(path),
    ("Engine.load", "runtime_cache"): lambda path: _engine(native=_Cache())._attach_runtime_cache(path),
    ("Engine.refit", "onnx_path"): lambda path: _engine().refit(path),
}


def test_every_path_of_every_public_function_is_tried() -> None:
    named: dict[str, Any] = {name: getattr(public, name) for name in public.__all__}
    methods = {f"{name}.{attribute}": getattr(owner, attribute) for name, owner in named.items() if inspect.isclass(owner)
               for attribute in vars(owner) if not attribute.startswith("_")}  # fmt: skip
    functions = {
        name: each for name, each in (named | methods).items() if isinstance(each, (types.FunctionType, types.MethodType))
    }
    found = {(name, p.name) for name, each in functions.items()
             for p in inspect.signature(each).parameters.values() if "Path" in str(p.annotation)}  # fmt: skip
    assert found == set(FUNCTIONS)


@pytest.mark.parametrize(("name", "parameter"), FUNCTIONS)
def test_a_public_function_refuses_what_is_no_regular_file(name: str, parameter: str, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    writes = parameter in WRITTEN or (name.startswith("export_") and parameter == "path")
    for kind in (*KINDS, "empty file"):
        if (parameter, kind) == ("root", "folder") or (writes and kind == "empty file"):
            continue
        special = made(kind, tmp_path / f"special{kind[:3]}.onnx")
        with not_waiting(), pytest.raises(ExportError, match=r"got '.*special.*\.onnx'.*allowed: "):
            FUNCTIONS[name, parameter](special)
        shutil.rmtree(special) if kind == "folder" else special.unlink()
        Path(f"{special}.fifo").unlink(missing_ok=True)
    assert {path.name for path in tmp_path.iterdir()} == before


INNER: dict[str, Callable[[Path], Any]] = {
    "check_onnx": atomic.check_onnx,
    "sha256_of": atomic.sha256_of,
    "copy_input": lambda path: atomic.copy_input("op", path, path.with_name("copy"), max_bytes=9),
    "read_input": lambda path: atomic.read_input("op", path, max_bytes=9),
    "external_files": manifest.external_files,
    "read_manifest": lambda path: manifest.read_manifest(str(path).removesuffix(manifest.SUFFIX)),
    "load_program": load_program,
    "inspect_file": inspect_file,
    "inspect_file's manifest": lambda path: inspect_file(_beside(path)),
}


def _beside(path: Path) -> str:
    """A good file with path as its manifest."""
    return shutil.copyfile("good.onnx", str(path).removesuffix(manifest.SUFFIX))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INNER)
def test_a_reader_refuses_what_is_no_regular_file(name: str, kind: str, tmp_path: Path) -> None:
    special = made(kind, tmp_path / f"special{manifest.SUFFIX}")
    with not_waiting(), pytest.raises((ExportError, OSError), match="allowed: a regular file"):
        INNER[name](special)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_agrees_with_regular_files_only(kind: str, tmp_path: Path) -> None:
    path = save(linear_model(), tmp_path / "m.onnx")
    written = manifest.write_manifest(path, "onnx")
    made(kind, tmp_path / "w")
    manifest.manifest_path(path).write_text(json.dumps(written | {"external_data": {"w": "0" * 64}}))
    with not_waiting():
        assert inspect_file(path)["manifest"] == "differs"
