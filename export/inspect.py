"""Describe an exported file: operators, dimensions, precision, size, hash. Nothing in it is run or unpickled."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from .files.atomic import ExportError, PathLike, check_input, check_onnx, sha256_of
from .files.manifest import read_manifest
from .tensorrt.backend import EXTRAS
from .tensorrt.profiles import check_text, graph_inputs, graph_outputs

OP = "inspect"
MAX_BYTES = 64 * 2**30
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


def inspect_file(path: PathLike) -> dict[str, Any]:
    """Describe an ONNX file, a TensorRT engine, a TorchScript file, an AOTInductor package or an ExportedProgram.

    Args:
        path: the file.

    Returns:
        A JSON-serialisable dict. Always there: file, kind, bytes, sha256, manifest ("none", "agrees" or "differs").
        Depending on the kind: opset, inputs, outputs, operators, weights (elements by dtype), profiles, versions, members.

    Raises:
        ExportError: the file is unreadable or of an unknown kind, or it is an ONNX file that check_onnx refuses.
    """
    source = check_input(OP, path, max_bytes=MAX_BYTES)
    manifest = read_manifest(source, OP)
    details: dict[str, Any] = {"file": str(source), "bytes": source.stat().st_size, "sha256": sha256_of(source)}
    details["manifest"] = (
        "none" if manifest is None else "agrees" if _agrees(source, details["sha256"], manifest) else "differs"
    )
    if zipfile.is_zipfile(source):
        return details | _archive(source)
    if source.suffix in ENGINE_SUFFIXES or (manifest is not None and manifest["kind"] in EXTRAS):
        return details | _engine(manifest)
    return details | _onnx(source)


def _agrees(source: Path, sha256: str, manifest: dict[str, Any]) -> bool:
    external = manifest.get("external_data") or {}
    files = ((source.parent / Path(name).name, digest) for name, digest in external.items())  # beside it, wherever it points
    try:
        return manifest["sha256"] == sha256 and all(sha256_of(file) == digest for file, digest in files)
    except (OSError, ValueError):  # one of them is missing, unreadable or no regular file
        return False


def _onnx(source: Path) -> dict[str, Any]:
    import onnx

    model = check_onnx(source, op=OP)
    check_text(OP, source, model)
    weights: Counter[str] = Counter()
    external: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        weights[onnx.TensorProto.DataType.Name(tensor.data_type)] += _count(tensor.dims)
        if tensor.data_location == tensor.EXTERNAL:
            external[next(entry.value for entry in tensor.external_data if entry.key == "location")] += 1
    return {
        "kind": "onnx",
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [str(tensor) + f" {tensor.dtype}" for tensor in graph_inputs(model)],
        "outputs": [str(tensor) + f" {tensor.dtype}" for tensor in graph_outputs(model)],
        "nodes": len(model.graph.node),
        "operators": dict(Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in model.graph.node).most_common()),
        "weights": dict(weights.most_common()),
        "external_data": {name: (source.parent / name).stat().st_size for name in external},
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


def _count(dims: Any) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total


def _engine(manifest: dict[str, Any] | None) -> dict[str, Any]:
    """An engine's description, from its manifest alone: the file's format is private, and loading it would run it."""
    if manifest is None:
        return {
            "kind": "tensorrt engine",
            "note": "no manifest beside it: its contents are known only to the TensorRT that made it",
        }
    names = ("kind", "versions", "source", "opset", "inputs", "outputs", "profiles", "options", "gpu")
    details = {name: manifest[name] for name in names if name in manifest}
    for name in ("inputs", "outputs"):
        details[name] = [f"{t['name']}({', '.join(map(str, t['dims']))}) {t['dtype']}" for t in details.get(name, [])]
    return details


def _archive(source: Path) -> dict[str, Any]:
    """The kind of a torch archive (a zip file), told by its members' names, with their count and the ten largest."""
    try:
        with zipfile.ZipFile(source) as archive:
            members = [(info.filename, info.file_size) for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ExportError(f"{OP}: {str(source)!r} is a broken archive: {error}") from None
    names = [name for name, _ in members]
    if any("/data/aotinductor/" in name for name in names):
        kind = "aoti"
    elif any("/models/" in name and name.endswith(".json") for name in names):
        kind = "exported program"
    elif any("/code/" in name for name in names):
        kind = "torchscript"
    else:
        raise ExportError(
            f"{OP}: {str(source)!r}: got an archive of another kind, allowed: TorchScript, AOTInductor, ExportedProgram"
        )
    largest = sorted(members, key=lambda member: -member[1])[:10]
    return {"kind": kind, "members": len(members), "largest": [f"{size} {name.partition('/')[2]}" for name, size in largest]}
