"""The demo's steps after training: torch.compile, ONNX, TensorRT, TorchScript. Each returns its rows."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.export import build_engine, export_onnx, export_torchscript, verify

from . import minilm
from .rows import Row

COMPILE, ONNX, ENGINE, SCRIPT = "torch.compile", "ONNX", "TensorRT engine", "TorchScript"
MAX_SEQUENCE = 512
OPSET = 20


def random_batch(batch: int, sequence: int, device: str = "cpu") -> minilm.Batch:
    """Token ids of a shape not used in export, the last token of each second sentence masked."""
    generator = torch.Generator().manual_seed(batch * 1000 + sequence)
    mask = torch.ones(batch, sequence, dtype=torch.long)
    mask[1::2, -1] = 0
    ids = torch.randint(1000, 30000, (batch, sequence), generator=generator)
    result = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: tensor.to(device) for name, tensor in result.items()}


def compile_rows(model: nn.Module, device: str) -> list[Row]:
    """Check torch.compile: one graph for two shapes, no graph break, and the results of the fused model without compile."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    errors = []
    for batch in (minilm.pair_batch(device), random_batch(3, 21, device)):
        with torch.no_grad():
            expected, got = model(**batch).last_hidden_state, compiled(**batch).last_hidden_state
        errors.append(float((got - expected).abs().max()))
    where = "Triton" if device == "cuda" else "fused operators by ATen, no GPU here"
    return [
        Row(COMPILE, "max |compiled - eager|", max(errors), "<=", 1e-5, f"fullgraph=True; {where}"),
        Row(COMPILE, "graphs for two shapes", counters["stats"]["unique_graphs"], "==", 1, "dynamic=True"),
    ]


def onnx_rows(model: nn.Module, path: Path, layer_norms: int) -> list[Row]:
    import onnx

    dims = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=MAX_SEQUENCE)}
    example = minilm.pair_batch()
    export_onnx(model, example, path, dynamic_shapes=dict.fromkeys(example, dims), opset=OPSET)
    unseen = [random_batch(1, 5), random_batch(7, 33), random_batch(2, 128)]
    report = verify(path, model, unseen)
    file = onnx.load(path)
    operators = Counter((node.domain, node.op_type) for node in file.graph.node)
    worst = max((row.relative_error for row in report.rows), default=float("inf"))
    cosine = min((row.cosine for row in report.rows), default=0.0)
    note = "ONNX Runtime at " + ", ".join(str(tuple(b["input_ids"].shape)) for b in unseen)
    return [
        Row(ONNX, "largest relative error", worst, "<=", 1e-5, note),
        Row(ONNX, "smallest 1 - cosine", 1 - cosine, "<=", 1e-6, f"over {len(report.rows)} outputs"),
        Row(ONNX, "NaN or infinity in unequal places", sum(row.nan_mismatches for row in report.rows), "==", 0),
        Row(ONNX, "opset", next(o.version for o in file.opset_import if not o.domain), "==", OPSET),
        Row(ONNX, "operators outside the standard", sum(n for (domain, _), n in operators.items() if domain), "==", 0),
        Row(ONNX, "LayerNormalization nodes", operators["", "LayerNormalization"], "==", layer_norms, "none decomposed"),
        *pair_rows(path),
    ]


def pair_rows(path: Path) -> list[Row]:
    """Check the exported ONNX file: the cosines of its embeddings are the published ones."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batch = minilm.pair_batch()
    names = [value.name for value in session.get_inputs()]
    hidden = session.run(["last_hidden_state"], {name: batch[name].numpy() for name in names})[0]
    got = minilm.cosines(minilm.pooled(torch.from_numpy(hidden), batch["attention_mask"]))
    error = max(abs(cosine - published) for cosine, published in zip(got, minilm.PUBLISHED))
    return [Row(ONNX, "|cosine - published|", error, "<=", 1e-4, ", ".join(f"{c:.6f}" for c in got))]


def engine_rows(onnx_path: Path, path: Path, weights: int, progress: Callable[..., bool]) -> list[Row]:
    """Build an engine from the ONNX file. Without a GPU it is built and hashed but not run, and the note says so."""
    import hashlib

    shapes = [(1, 1), (8, 128), (64, MAX_SEQUENCE)]
    names = list(minilm.pair_batch())
    report = build_engine(
        onnx_path, path, backend="tensorrt_rtx", profiles=dict.fromkeys(names, tuple(shapes)), progress=progress
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    shown = " to ".join(str(shape) for shape in (shapes[0], shapes[-1]))
    what = f"{report.backend} {report.version}, profile {shown}; built, not run"
    return [
        Row(ENGINE, "bytes, at least its weights", path.stat().st_size, ">=", weights, what),
        Row(ENGINE, "SHA-256 differs from its manifest", int(digest != report.manifest["sha256"]), "==", 0, digest[:16]),
    ]


LOADER = """
import sys
sys.modules["fused_ops"] = None  # the file must not need it
import torch
model, batches = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    results = [model(*batch) for batch in batches]
torch.save([result[0] for result in results], sys.argv[3])
"""


def script_rows(model: nn.Module, path: Path) -> list[Row]:
    """Trace and save the model, and run the file at other shapes in a process in which fused_ops cannot be imported."""
    export_torchscript(model, minilm.pair_batch(), path, mode="trace")
    batches = [minilm.pair_batch(), random_batch(3, 17)]
    inputs, outputs = path.with_suffix(".inputs"), path.with_suffix(".outputs")
    try:
        torch.save([tuple(batch.values()) for batch in batches], inputs)
        command = [sys.executable, "-c", LOADER, str(path), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the process that loads {path.name} failed: {done.stderr[-400:]}")
        got: list[Tensor] = torch.load(outputs, weights_only=True)
    finally:
        inputs.unlink(missing_ok=True)
        outputs.unlink(missing_ok=True)
    with torch.no_grad():
        expected: list[Any] = [model(**batch).last_hidden_state for batch in batches]
    error = max(float((a - b).abs().max()) for a, b in zip(got, expected))
    return [Row(SCRIPT, "max |loaded - eager|", error, "<=", 1e-5, "traced; loaded without fused_ops")]
