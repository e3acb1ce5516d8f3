"""A model repository for NVIDIA Triton Inference Server: folders, config.pbtxt, and the exported file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import MAX_EXTERNAL_BYTES, ExportError, PathLike, check_input, check_onnx, copy_input, read_input
from ..files.manifest import external_files, read_manifest, write_manifest
from .server_config import OP, Batching, Port, add_instances, check_batching, model_config, validated

MAX_BYTES = 64 * 2**30
MAX_CONFIG_BYTES = 2**24
BACKENDS = {  # suffix: (backend, kind, file name that the backend looks for)
    ".onnx": ("onnxruntime", "onnx", "model.onnx"),
    ".engine": ("tensorrt", "tensorrt", "model.plan"),
    ".plan": ("tensorrt", "tensorrt", "model.plan"),
    ".pt": ("pytorch", "torchscript", "model.pt"),
    ".ts": ("pytorch", "torchscript", "model.pt"),
}


def export_model_repository(
    root: PathLike,
    name: str,
    artefact: PathLike,
    *,
    version: int = 1,
    max_batch_size: int = 0,
    preferred_batch_sizes: Sequence[int] = (),
    max_queue_delay_us: int = 0,
    instances: int = 1,
    kind: str = "auto",
    gpus: Sequence[int] = (),
    inputs: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    outputs: Mapping[str, tuple[str, Sequence[int]]] | None = None,
) -> Path:
    """Put an exported file into a model repository as <root>/<name>/<version>, with a config.pbtxt.

    Args:
        root: the repository's folder. It is created if it is missing and its parent exists.
        name: the model's name: letters, digits, ".", "_" and "-".
        artefact: model.onnx (external data comes along), a `tensorrt` engine with its manifest, or a TorchScript file.
        version: 1 or more; an existing version is never replaced.
        max_batch_size: above 0 the server batches requests along dimension 0 of every input and output.
        preferred_batch_sizes, max_queue_delay_us: dynamic batching: sizes to aim for, and how long to wait for them.
        instances: copies of the model on each device; several run at once, on streams of their own.
        kind: "auto", "gpu" or "cpu"; gpus: device indices, all by default.
        inputs, outputs: {name: (dtype, dims)}, required for TorchScript, whose file does not hold them; dims with -1
            where dynamic, the batch included; dtype as ONNX names it: "FLOAT", "INT64". TorchScript names are
            "<anything>__<position>", inputs also forward's own argument names.

    Returns:
        The folder <root>/<name>.

    Raises:
        ExportError: a bad argument or file, or a version that exists already; the repository stays as it was.
        ModuleNotFoundError: tritonclient, whose schema checks config.pbtxt, is not installed.
    """
    source = check_input(OP, artefact, max_bytes=MAX_BYTES, argument="artefact")
    if source.suffix not in BACKENDS:
        raise ExportError(f"{OP}: artefact: got {source.name!r}, allowed: a file that ends in {', '.join(BACKENDS)}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ExportError(f"{OP}: name: got {name!r}, allowed: letters, digits, '.', '_' and '-'")
    if version < 1:
        raise ExportError(f"{OP}: version: got {version}, allowed: 1 or more")
    backend, made_by, filename = BACKENDS[source.suffix]
    ports_in, ports_out, files = _ports(source, made_by, inputs, outputs)
    batching = Batching(max_batch_size, tuple(preferred_batch_sizes), max_queue_delay_us)
    check_batching(batching, source, ports_in, ports_out)
    message = model_config(name, backend, filename, batching, ports_in, ports_out)
    add_instances(message, instances, kind, gpus)
    text = validated(message)

    target = Path(os.path.abspath(root)) / name
    _check_target(target, version, text)
    stage = Path(tempfile.mkdtemp(prefix=f".{name[:64]}.", dir=target.parent.parent))  # outside what a server may be watching
    try:
        folder = stage / name / str(version)
        folder.mkdir(parents=True)
        copy_input(OP, source, folder / filename, max_bytes=MAX_BYTES, argument="artefact")
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            copy_input(OP, source.parent / file, folder / file, max_bytes=MAX_EXTERNAL_BYTES, argument="external data")
        before = read_manifest(source, OP) or {}
        fields = {key: before[key] for key in ("versions", "profiles", "opset", "options", "gpu") if key in before}
        write_manifest(folder / filename, made_by, **fields, source={"file": source.name})
        (stage / name / "config.pbtxt").write_text(text, encoding="utf-8")
        target.parent.mkdir(exist_ok=True)
        new = folder if target.exists() else stage / name
        os.replace(new, target / str(version) if target.exists() else target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def _check_target(target: Path, version: int, text: str) -> None:
    if not target.parent.parent.is_dir() or (target.parent.exists() and not target.parent.is_dir()):
        raise ExportError(f"{OP}: root: got {str(target.parent)!r}, allowed: a folder, or a new one in a folder that exists")
    if (target / str(version)).exists():
        raise ExportError(f"{OP}: version: got {version}, which {str(target)!r} has already, allowed: a new version")
    if target.exists():
        config = target / "config.pbtxt"
        if not config.exists() or read_input(OP, config, max_bytes=MAX_CONFIG_BYTES, argument="config.pbtxt") != text.encode():
            raise ExportError(
                f"{OP}: {str(target)!r}: got another config.pbtxt than its versions have, allowed: the same, or a new name"
            )


def _ports(source: Path, kind: str, inputs: Any, outputs: Any) -> tuple[list[Port], list[Port], list[str]]:
    """(inputs, outputs, external data files), read from the file, from its manifest, or from the caller's arguments."""
    if kind == "onnx":
        from ..tensorrt.profiles import graph_inputs, graph_outputs

        model = check_onnx(source, op=OP)
        files = external_files(source)
        read = [[(t.name, t.dtype, tuple(d if isinstance(d, int) else -1 for d in t.dims)) for t in side]
                for side in (graph_inputs(model), graph_outputs(model))]  # fmt: skip
        return read[0], read[1], files
    if kind == "tensorrt" and not (inputs and outputs):
        manifest = read_manifest(source, OP)
        if manifest is None:
            raise ExportError(f"{OP}: artefact: {source.name!r} has no manifest beside it, allowed: one, or inputs and outputs")
        if manifest["kind"] != "tensorrt":
            raise ExportError(
                f"{OP}: artefact: got an engine of {manifest['kind']!r}, allowed: of 'tensorrt', which is what the server runs"
            )
        read = [[(t["name"], t["dtype"], tuple(d if isinstance(d, int) else -1 for d in t["dims"])) for t in manifest[side]]
                for side in ("inputs", "outputs")]  # fmt: skip
        return read[0], read[1], []
    if not inputs or not outputs:
        raise ExportError(
            f"{OP}: inputs, outputs: got none, allowed: {{name: (dtype, dims)}}, which {source.name!r} does not hold"
        )
    given = [[(port, dtype, tuple(dims)) for port, (dtype, dims) in side.items()] for side in (inputs, outputs)]
    if kind == "torchscript":
        _check_torchscript(source, given[0], given[1])
    return given[0], given[1], []


def _check_torchscript(source: Path, inputs: list[Port], outputs: list[Port]) -> None:
    """Raise ExportError unless the server's PyTorch backend can map each name to a position of forward."""
    import torch

    try:
        module = torch.jit.load(str(source), map_location="cpu")
        arguments = [argument.name for argument in module.forward.schema.arguments][1:]
    except (RuntimeError, AttributeError) as error:
        raise ExportError(f"{OP}: artefact: {source.name!r} is no TorchScript file: {str(error).splitlines()[0]}") from None
    if len(inputs) != len(arguments):
        raise ExportError(f"{OP}: inputs: got {len(inputs)}, allowed: {len(arguments)}, forward's {', '.join(arguments)}")
    for label, side, known in (("inputs", inputs, arguments), ("outputs", outputs, [])):
        for name, _, _ in side:
            if not re.fullmatch(r".+__\d+", name) and name not in known:
                extra = f", or {', '.join(known)}" if known else ""
                raise ExportError(f"{OP}: {label}: got {name!r}, allowed: '<anything>__<position>'{extra}")
