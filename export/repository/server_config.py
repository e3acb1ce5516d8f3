"""config.pbtxt of NVIDIA Triton Inference Server, checked by the server's own protobuf schema."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import ExportError, require
from ..files.manifest import read_manifest

OP = "export_model_repository"
TYPES = {  # ONNX's name: Triton's
    "FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "DOUBLE": "TYPE_FP64", "BOOL": "TYPE_BOOL",
    "INT8": "TYPE_INT8", "INT16": "TYPE_INT16", "INT32": "TYPE_INT32", "INT64": "TYPE_INT64", "UINT8": "TYPE_UINT8",
    "UINT16": "TYPE_UINT16", "UINT32": "TYPE_UINT32", "UINT64": "TYPE_UINT64", "STRING": "TYPE_STRING",
}  # fmt: skip
Port = tuple[str, str, tuple[int, ...]]  # name, ONNX dtype, dims with -1 where dynamic


@dataclass(frozen=True)
class Batching:
    """How the server batches requests.

    max_size: the largest batch, 0 for no batching. preferred: batch sizes to aim for. delay_us: the longest time, in
    microseconds, that a request waits for others.
    """

    max_size: int = 0
    preferred: tuple[int, ...] = ()
    delay_us: int = 0


def check_batching(batching: Batching, source: Path, inputs: list[Port], outputs: list[Port]) -> None:
    if batching.max_size < 0 or batching.delay_us < 0:
        raise ExportError(
            f"{OP}: max_batch_size, max_queue_delay_us: got {batching.max_size}, {batching.delay_us}, allowed: 0 or more"
        )
    if not batching.max_size:
        if batching.preferred or batching.delay_us:
            raise ExportError(
                f"{OP}: preferred_batch_sizes, max_queue_delay_us: got some, allowed: with max_batch_size above 0"
            )
        return
    fixed = [f"{name}{list(dims)}" for name, _, dims in (*inputs, *outputs) if not dims or dims[0] != -1]
    if fixed:
        raise ExportError(
            f"{OP}: max_batch_size: got {batching.max_size}, allowed: 0, because dimension 0 is no batch in {', '.join(fixed)}"
        )
    wrong = [size for size in batching.preferred if not 1 <= size <= batching.max_size]
    if wrong:
        raise ExportError(f"{OP}: preferred_batch_sizes: got {wrong[0]}, allowed: 1 to max_batch_size, {batching.max_size}")
    manifest = read_manifest(source, OP) or {}
    for profile in manifest.get("profiles", [])[:1]:  # the server runs an instance under profile 0 unless told otherwise
        for name, (_, _, high) in profile.items():
            if batching.max_size > high[0]:
                raise ExportError(
                    f"{OP}: max_batch_size: got {batching.max_size}, allowed: at most {high[0]}, the profile's maximum of {name!r}"
                )


def model_config(name: str, backend: str, filename: str, batching: Batching, inputs: list[Port], outputs: list[Port]) -> Any:
    """The server's ModelConfig message for a model. It has no instance group yet: see add_instances."""
    config = schema().ModelConfig(name=name, backend=backend, default_model_filename=filename, max_batch_size=batching.max_size)
    for ports, field in ((inputs, config.input), (outputs, config.output)):
        for port, dtype, dims in ports:
            if dtype not in TYPES:
                raise ExportError(f"{OP}: {port}: dtype: got {dtype!r}, allowed: {', '.join(TYPES)}")
            own = list(dims[1:] if batching.max_size else dims)
            entry = field.add(name=port, data_type=schema().DataType.Value(TYPES[dtype]), dims=own or [1])
            if not own:  # the server has no empty shape: one element outside, none inside
                entry.reshape.SetInParent()
    if batching.max_size:
        config.dynamic_batching.preferred_batch_size.extend(batching.preferred)
        config.dynamic_batching.max_queue_delay_microseconds = batching.delay_us
    return config


def add_instances(config: Any, count: int, kind: str, gpus: Sequence[int]) -> None:
    kinds = {"auto": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU"}
    if count < 1:
        raise ExportError(f"{OP}: instances: got {count}, allowed: 1 or more")
    if kind not in kinds:
        raise ExportError(f"{OP}: kind: got {kind!r}, allowed: {', '.join(map(repr, kinds))}")
    if (gpus and kind == "cpu") or any(index < 0 for index in gpus):
        raise ExportError(
            f"{OP}: gpus: got {list(gpus)} with kind {kind!r}, allowed: device indices from 0, with 'gpu' or 'auto'"
        )
    if config.backend == "tensorrt" and kind == "cpu":
        raise ExportError(f"{OP}: kind: got 'cpu', allowed: 'gpu' or 'auto' for a TensorRT engine")
    group = config.instance_group.add(count=count, gpus=list(gpus))
    group.kind = group.Kind.Value(kinds[kind])


def validated(config: Any) -> str:
    """The text of config.pbtxt. It is parsed again by the server's schema, which refuses unknown fields and wrong types."""
    text_format = require("google.protobuf.text_format", "serving")
    text = str(text_format.MessageToString(config))
    if text_format.Parse(text, schema().ModelConfig()) != config:
        raise ExportError(f"{OP}: config.pbtxt does not read back as it was written")
    return text


def schema() -> Any:
    """The module model_config_pb2 of tritonclient, loaded from its file because importing its package needs grpc."""
    global _SCHEMA
    if _SCHEMA is None:
        package = require("tritonclient", "serving")
        file = Path(next(iter(package.__path__))) / "grpc" / "model_config_pb2.py"
        spec = importlib.util.spec_from_file_location("fused_ops_model_config_pb2", file)
        if spec is None or spec.loader is None:
            raise ExportError(f"{OP}: tritonclient has no {file.name}")
        _SCHEMA = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_SCHEMA)
    return _SCHEMA


_SCHEMA: Any = None
