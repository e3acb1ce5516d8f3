"""The manifest beside each artefact: what it is, what it was made from, and the SHA-256 that a loader checks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch

from .atomic import MAX_ONNX_BYTES, ExportError, PathLike, read_input, sha256_of, tensors

SUFFIX = ".manifest.json"
FORMAT = 1
MAX_BYTES = 2**24


def manifest_path(artefact: PathLike) -> Path:
    """model.engine -> model.engine.manifest.json"""
    return Path(os.fspath(artefact) + SUFFIX)


def write_manifest(artefact: PathLike, kind: str, **fields: Any) -> dict[str, Any]:
    """Write the manifest of the file `artefact` beside it. It holds no time and no paths: equal inputs give equal bytes.

    Args:
        artefact: the finished (or staged) file.
        kind: "onnx", "tensorrt", "tensorrt_rtx", "torchscript" or "aoti".
        fields: further JSON-serialisable entries, such as source, opset, precision, profiles, options, inputs, outputs.

    Returns:
        The manifest.
    """
    path = Path(artefact)
    if kind == "onnx":
        fields["external_data"] = {name: sha256_of(path.parent / name) for name in external_files(path)}
    manifest = {
        "manifest": FORMAT,
        "kind": kind,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "versions": {"fused-ops": package_version("fused-ops"), "torch": torch.__version__, **fields.pop("versions", {})},
        **fields,
    }
    manifest_path(path).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return manifest


def external_files(onnx_file: Path) -> list[str]:
    """The files that hold the external data of an ONNX file, relative to its folder. The file must have been checked."""
    import onnx

    model = onnx.load_model_from_string(read_input("onnx", onnx_file, max_bytes=MAX_ONNX_BYTES))
    entries = (entry for tensor in tensors(model) if tensor.data_location == tensor.EXTERNAL for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def read_manifest(artefact: PathLike, op: str = "manifest") -> dict[str, Any] | None:
    """The manifest beside artefact, or None if there is none. Trust it no more than the artefact: both may be forged.

    Raises:
        ExportError: the file is not a manifest of this format.
    """
    path = manifest_path(artefact)
    if not path.exists():
        return None
    text = read_input(op, path, max_bytes=MAX_BYTES, argument="manifest")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise ExportError(f"{op}: {str(path)!r} is no JSON") from None
    if not isinstance(manifest, dict) or manifest.get("manifest") != FORMAT or not _well_formed(manifest):
        raise ExportError(f"{op}: {str(path)!r} is no manifest of format {FORMAT}")
    return manifest


def _well_formed(manifest: dict[str, Any]) -> bool:
    """Whether the entries that readers rely on have the types that write_manifest gives them."""
    try:
        ports = [*manifest.get("inputs", []), *manifest.get("outputs", [])]
        ranges = [shapes for profile in manifest.get("profiles", []) for shapes in profile.values()]
        return (
            all(isinstance(manifest.get(name), str) for name in ("kind", "sha256"))
            and all(isinstance(value, str) for port in ports for value in (port["name"], port["dtype"]))
            and all(type(dim) in (int, str) for port in ports for dim in port["dims"])
            and all(len(shapes) == 3 and all(type(dim) is int for shape in shapes for dim in shape) for shapes in ranges)
            and all(isinstance(digest, str) for digest in dict(manifest.get("external_data") or {}).values())
        )
    except (TypeError, KeyError, AttributeError, ValueError):
        return False


def check_hash(op: str, path: PathLike, data: bytes, sha256: str | None) -> dict[str, Any] | None:
    """Check the SHA-256 of data, the bytes of the file at path, against the caller's (or None) and the manifest's.

    Returns:
        The manifest beside the file, or None if there is none.

    Raises:
        ExportError: a hash differs, or sha256 is not 64 hexadecimal digits.
    """
    actual = hashlib.sha256(data).hexdigest()
    if sha256 is not None:
        if len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef"):
            raise ExportError(f"{op}: sha256: got {sha256!r}, allowed: 64 hexadecimal digits")
        if sha256.lower() != actual:
            raise ExportError(f"{op}: {str(path)!r}: got SHA-256 {actual}, allowed: {sha256.lower()}; not loaded")
    manifest = read_manifest(path, op)
    if manifest is not None and manifest["sha256"] != actual:
        raise ExportError(f"{op}: {str(path)!r}: got SHA-256 {actual}, its manifest says {manifest['sha256']}; not loaded")
    return manifest


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
