"""Write files whole or not at all, and check input files, ONNX above all, before any parser reads them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..._runtime.files import NotRegularError, open_regular, read_open

PathLike = str | os.PathLike[str]

MAX_ONNX_BYTES = 2**31 - 1  # protobuf's own limit of one message
MAX_EXTERNAL_BYTES = 64 * 2**30  # of all external data files together


class ExportError(RuntimeError):
    """An export, a check or a build failed. The message names the argument, the value that came and what is allowed."""


def require(module: str, extra: str) -> Any:
    """The imported module, or a ModuleNotFoundError that says which extra of fused-ops installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        message = f"{error.name} is not installed; it comes with: pip install 'fused-ops[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None


def check_writable(op: str, path: PathLike) -> Path:
    """path as an absolute Path to a file that can be written; ExportError if it cannot. No file is created."""
    target = Path(os.path.abspath(os.fspath(path)))
    if target.is_dir():
        raise ExportError(f"{op}: path: got {str(target)!r}, a folder, allowed: a file name")
    if not target.parent.is_dir():
        raise ExportError(
            f"{op}: path: got {str(target)!r}, allowed: a file in a folder that exists; {str(target.parent)!r} does not"
        )
    if target.exists() and (not target.is_file() or not os.access(target, os.W_OK)):
        raise ExportError(
            f"{op}: path: got {str(target)!r}, which cannot be overwritten, allowed: a writable regular file or a new one"
        )
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ExportError(f"{op}: path: got {str(target)!r}, allowed: a file in a writable folder ({error.strerror})") from None
    return target


@contextlib.contextmanager
def output(op: str, path: PathLike) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; the file written there is moved to `path` when the block ends.

    Files written beside it (external data) are moved first. If the block raises, or writes nothing, an existing file at
    `path` stays as it is and the temporary folder is removed. A symbolic link at `path` is replaced, not followed.
    """
    target = check_writable(op, path)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent))
    try:
        staged = folder / target.name
        yield staged
        if not staged.is_file():
            raise ExportError(f"{op}: nothing was written for {str(target)!r}")
        for extra in sorted(folder.iterdir()):
            if extra != staged:
                os.replace(extra, target.parent / extra.name)
        os.replace(staged, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(op: str, path: PathLike, data: bytes) -> Path:
    """Write data to path, whole or not at all."""
    with output(op, path) as staged:
        staged.write_bytes(data)
    return Path(path)


def sha256_of(path: PathLike) -> str:
    """The SHA-256 of a regular file in hexadecimal."""
    with open_regular(path) as file:
        return _digest(file)


def _digest(file: Any) -> str:
    if hasattr(hashlib, "file_digest"):  # from Python 3.11 on
        return str(hashlib.file_digest(file, "sha256").hexdigest())
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def open_input(op: str, path: PathLike, *, max_bytes: int, argument: str = "path") -> BinaryIO:
    """The readable regular file at path, of 1 to max_bytes bytes, opened; ExportError otherwise, and at once."""
    source, file = Path(path), _opened(op, path, argument)
    size = os.fstat(file.fileno()).st_size
    if not 0 < size <= max_bytes:
        file.close()
        raise ExportError(f"{op}: {argument}: got {str(source)!r} of {size} bytes, allowed: 1 to {max_bytes} bytes")
    return file


def check_regular(op: str, path: PathLike, *, argument: str = "path") -> None:
    """Raise ExportError unless path names a readable regular file, of any size."""
    _opened(op, path, argument).close()


def _opened(op: str, path: PathLike, argument: str) -> BinaryIO:
    source = Path(path)
    try:
        return open_regular(source)
    except NotRegularError as error:
        raise ExportError(f"{op}: {argument}: got {str(source)!r}, {error.strerror}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        said = error.strerror if isinstance(error, OSError) else error
        raise ExportError(f"{op}: {argument}: got {str(source)!r}, allowed: a readable file ({said})") from None


def check_input(op: str, path: PathLike, *, max_bytes: int, argument: str = "path") -> Path:
    """path as a Path to a file that open_input opens, for a parser that takes a path; ExportError otherwise."""
    open_input(op, path, max_bytes=max_bytes, argument=argument).close()
    return Path(path)


def read_input(op: str, path: PathLike, *, max_bytes: int, argument: str = "path") -> bytes:
    """The bytes of a file that open_input opens; ExportError otherwise."""
    with open_input(op, path, max_bytes=max_bytes, argument=argument) as file:
        try:
            return read_open(file)
        except OSError as error:
            raise ExportError(
                f"{op}: {argument}: got {os.fspath(path)!r}, allowed: a readable file ({error.strerror})"
            ) from None


def copy_input(op: str, path: PathLike, target: Path, *, max_bytes: int, argument: str = "path") -> None:
    """Copy a file that open_input opens to target, a new file; ExportError otherwise."""
    with open_input(op, path, max_bytes=max_bytes, argument=argument) as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


def check_onnx(
    path: PathLike, *, op: str = "onnx", max_bytes: int = MAX_ONNX_BYTES, max_external_bytes: int = MAX_EXTERNAL_BYTES
) -> Any:
    """Check an ONNX file and its external data before any other parser sees them.

    Args:
        path: the .onnx file.
        op: the caller's name, for messages.
        max_bytes, max_external_bytes: caps on the file and on all external data files together.

    Returns:
        The onnx.ModelProto, external data not loaded.

    Raises:
        ExportError: the file is unreadable, empty, too large, truncated, no ONNX, or invalid (onnx.checker with
            full_check); or its external data leaves the model's folder, is a link, is missing, or lies outside its file.
    """
    onnx = require("onnx", "onnx")
    source, data = Path(path), read_input(op, path, max_bytes=max_bytes)
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:
        raise ExportError(f"{op}: {str(source)!r} is no ONNX file, or a truncated one ({_one_line(error)})") from None
    if not model.HasField("graph") or not model.opset_import:
        raise ExportError(f"{op}: {str(source)!r} is no ONNX model: it has no {'graph' if model.opset_import else 'opset'}")
    _check_external_data(op, source, model, max_external_bytes)
    try:
        onnx.checker.check_model(os.fspath(source), full_check=True)
    except Exception as error:
        raise ExportError(f"{op}: {str(source)!r} is not valid ONNX: {_one_line(error)}") from None
    return model


def _check_external_data(op: str, source: Path, model: Any, cap: int) -> None:
    """Raise ExportError unless external tensors lie inside regular files in the model's folder, of at most cap bytes in all."""
    folder, sizes = source.resolve().parent, {}
    for tensor in tensors(model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        name = entry.get("location", "")
        where = f"{op}: {str(source)!r}: tensor {tensor.name[:100]!r}: external data location {name[:200]!r}"
        file = folder / name
        if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
            raise ExportError(f"{where}, allowed: a relative path inside the model's folder")
        if any(p.is_symlink() for p in (file, *file.parents) if p != folder and folder in p.parents):
            raise ExportError(f"{where} is a symbolic link, allowed: a regular file")
        if not file.is_file():
            raise ExportError(f"{where}: no such regular file")
        size = sizes[name] = file.stat().st_size
        try:
            offset = int(entry.get("offset") or 0)
            length = int(entry.get("length") or size - offset)
        except ValueError:
            raise ExportError(f"{where}: offset or length is no number") from None
        if offset < 0 or length < 0 or offset + length > size:
            raise ExportError(f"{where}: bytes {offset} to {offset + length} lie outside the file of {size} bytes")
    if sum(sizes.values()) > cap:
        raise ExportError(f"{op}: {str(source)!r}: external data of {sum(sizes.values())} bytes, allowed: at most {cap}")


def tensors(model: Any) -> Iterator[Any]:
    """Every TensorProto of a model: initializers (sparse ones too) and attributes, of all subgraphs and functions."""
    graphs, nodes = [model.graph], [n for f in model.functions for n in f.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs.extend((attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs)


def _one_line(error: Exception, limit: int = 500) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
