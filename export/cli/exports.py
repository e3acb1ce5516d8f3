"""The commands `fused-ops export onnx`, `engine`, `torchscript`, `aoti` and `repository`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .sources import errors, load_source, show

Model = Annotated[Optional[str], typer.Option("--model", help="package.module:factory, a callable that returns the module.")]
Hf = Annotated[Optional[Path], typer.Option("--hf", help="Local Hugging Face folder: config.json, model.safetensors.")]
Program = Annotated[Optional[Path], typer.Option("--program", help="ExportedProgram saved by torch.export.save (.pt2).")]
Inputs = Annotated[
    Optional[list[str]],
    typer.Option("--input", help="NAME=DTYPE[DIM,...]; DIM is a number, or name:number for a dynamic one. Repeat in order."),
]
Fuse = Annotated[bool, typer.Option("--fuse", help="Fuse the model first; the file needs nothing of fused-ops all the same.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="File to write.")]

app = typer.Typer(no_args_is_help=True, help="Write a model to a file that can be deployed.")


def _wrote(path: Path, as_json: bool, **details: Any) -> None:
    show({"wrote": str(path), "bytes": path.stat().st_size, **details}, as_json)


@app.command()
def onnx(
    output: Out, model: Model = None, hf: Hf = None, program: Program = None, inputs: Inputs = None, fuse: Fuse = False,
    opset: Annotated[int, typer.Option(help="18 to 25.")] = 20,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16: weights and activations, in the graph.")] = "fp32",
    keep_fp32: Annotated[str, typer.Option(help="What stays fp32 then, comma-separated.")] = "norm,softmax",
    submodule: Annotated[Optional[str], typer.Option(help="Export this part only, as encoder.layer.0.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write an ONNX file: standard operators only, dynamic dimensions named, checked by onnx.

    Example: fused-ops export onnx --hf ./minilm -o minilm.onnx --precision fp16
    """
    from ..onnx.exporter import export_onnx, export_submodule

    with errors("export onnx"):
        source = load_source(model, hf, program, inputs or (), fuse=fuse)
        options: dict[str, Any] = {
            "opset": opset,
            "precision": precision,
            "keep_fp32": tuple(filter(None, keep_fp32.split(","))),
        }
        if submodule is not None:
            export_submodule(source.model, submodule, source.example(), output, **options)
        else:
            export_onnx(source.model, source.example() or (), output, dynamic_shapes=source.dynamic_shapes, **options)
        from ..inspect import inspect_file

        details = inspect_file(output)
        _wrote(output, as_json, **{name: details[name] for name in ("sha256", "opset", "inputs", "outputs", "operators")})


def _profiles(low: list[str], best: list[str], high: list[str]) -> list[dict[str, Any]]:
    """Optimisation profiles from --minShapes, --optShapes and --maxShapes: the k-th text of each makes profile k.

    A text is written as for trtexec: x:1x16,y:1x16.
    """
    from ..files.atomic import ExportError

    if not len(low) == len(best) == len(high):
        counts = f"{len(low)}, {len(best)}, {len(high)}"
        raise ExportError(f"--minShapes, --optShapes, --maxShapes: got {counts} of them, allowed: the same number of each")
    return [_profile(*texts) for texts in zip(low, best, high)]


def _profile(*texts: str) -> dict[str, Any]:
    from ..files.atomic import ExportError

    try:
        shapes = [{name: tuple(map(int, dims.split("x"))) for name, dims in _pairs(text)} for text in texts]
    except ValueError:
        raise ExportError(f"shapes: got {' '.join(texts)!r}, allowed: NAME:1x16,OTHER:1x16") from None
    if not shapes[0].keys() == shapes[1].keys() == shapes[2].keys():
        raise ExportError(f"shapes: got {', '.join(texts)}, allowed: the same inputs in min, opt and max")
    return {name: tuple(shape[name] for shape in shapes) for name in shapes[0]}


def _pairs(text: str) -> list[list[str]]:
    return [part.rsplit(":", 1) for part in text.split(",")]


def _pools(texts: list[str]) -> dict[str, int]:
    """Bytes by pool, from --memPoolSize as for trtexec: workspace:1024 is in MiB, unless B, K, M or G follows the number."""
    from ..files.atomic import ExportError

    units = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    pools = {}
    for part in (part for text in texts for part in text.split(",")):
        name, _, size = part.partition(":")
        digits, unit = (size[:-1], size[-1:].upper()) if size[-1:].upper() in units else (size, "M")
        if not digits.isdigit():
            raise ExportError(f"--memPoolSize: got {part!r}, allowed: POOL:SIZE in MiB, or SIZE with B, K, M or G behind")
        pools[name] = int(digits) * units[unit]
    return pools


@app.command()
def engine(
    onnx: Annotated[Path, typer.Option("--onnx", help="The ONNX file.")],
    save: Annotated[Path, typer.Option("--saveEngine", "-o", help="The engine to write, a manifest beside it.")],
    low: Annotated[Optional[list[str]], typer.Option("--minShapes", help="NAME:1x16,...; repeat for more profiles.")] = None,
    best: Annotated[Optional[list[str]], typer.Option("--optShapes", help="Likewise.")] = None,
    high: Annotated[Optional[list[str]], typer.Option("--maxShapes", help="Likewise.")] = None,
    backend: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt_rtx.")] = "auto",
    capabilities: Annotated[str, typer.Option("--computeCapabilities", help="RTX: GPUs to build for, as 8.9,12.0.")] = "",
    pools: Annotated[Optional[list[str]], typer.Option("--memPoolSize", help="workspace:1024 (MiB).")] = None,
    streams: Annotated[Optional[int], typer.Option("--maxAuxStreams")] = None,
    level: Annotated[Optional[int], typer.Option("--builderOptimizationLevel", help="0 to 5.")] = None,
    hardware: Annotated[str, typer.Option("--hardwareCompatibilityLevel")] = "none",
    version: Annotated[bool, typer.Option("--versionCompatible")] = False,
    refit: Annotated[bool, typer.Option("--refit")] = False,
    strip: Annotated[bool, typer.Option("--stripWeights")] = False,
    cache: Annotated[Optional[Path], typer.Option("--timingCacheFile")] = None,
    verbosity: Annotated[str, typer.Option("--profilingVerbosity")] = "layer_names_only",
    tf32: Annotated[bool, typer.Option("--tf32/--noTF32", help="TF32 in fp32 matrix products.")] = False,
    layers: Annotated[Optional[Path], typer.Option("--exportLayerInfo", help="Layer report as JSON; needs a GPU.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print all that TensorRT logs.")] = False,
    as_json: Json = False,
) -> None:
    """Build a TensorRT engine from an ONNX file. Flags are named as trtexec's; the precision is the ONNX file's.

    Example: fused-ops export engine --onnx m.onnx --saveEngine m.engine --minShapes x:1x16 --optShapes x:8x16 --maxShapes x:32x16
    """
    from ..files.atomic import ExportError, check_writable, write_bytes
    from ..tensorrt.backend import has_gpu
    from ..tensorrt.build import Engine, build_engine

    with errors("export engine"):
        if layers is not None:
            check_writable("--exportLayerInfo", layers)
            if not has_gpu():
                raise ExportError(
                    "--exportLayerInfo: not possible here: the layers are known to a loaded engine, which needs a GPU"
                )
        report = build_engine(
            onnx, save, backend=backend, profiles=_profiles(low or [], best or [], high or []),
            compute_capability=tuple(filter(None, capabilities.split(","))), memory_pools=_pools(pools or []),
            max_aux_streams=streams, optimization_level=level, hardware_compatibility=hardware, version_compatible=version,
            refit=refit, strip_weights=strip, timing_cache=cache, profiling_verbosity=verbosity, tf32=tf32, verbose=verbose,
        )  # fmt: skip
        if layers is not None:
            with Engine.load(save, sha256=report.sha256) as loaded:
                write_bytes("--exportLayerInfo", layers, json.dumps(loaded.layers(), indent=1).encode())
        details = {
            "sha256": report.sha256,
            "backend": f"{report.backend} {report.version}",
            "seconds": round(report.seconds, 2),
        }
        _wrote(report.path, as_json, **details, profiles=report.manifest["profiles"], messages=list(report.warnings))


@app.command()
def torchscript(
    output: Out, model: Model = None, hf: Hf = None, inputs: Inputs = None, fuse: Fuse = False,
    mode: Annotated[str, typer.Option(help="trace or script.")] = "trace",
    freeze: Annotated[bool, typer.Option(help="Make the weights constants.")] = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a TorchScript file that Python and C++ load without fused-ops.

    Example: fused-ops export torchscript --model mypackage.models:mlp --input 'input=float32[2,32]' -o mlp.pt
    """
    from ..torchscript import export_torchscript

    with errors("export torchscript"):
        source = load_source(model, hf, None, inputs or (), fuse=fuse)
        export_torchscript(source.model, source.example(), output, mode=mode, freeze=freeze)
        _wrote(output, as_json)


@app.command()
def aoti(
    output: Out, model: Model = None, hf: Hf = None, program: Program = None, inputs: Inputs = None, fuse: Fuse = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write an AOTInductor package, compiled for this machine's kind of device.

    Example: fused-ops export aoti --hf ./minilm -o minilm.pt2
    """
    from ..aoti import export_aoti

    with errors("export aoti"):
        source = load_source(model, hf, program, inputs or (), fuse=fuse)
        export_aoti(source.model, source.example() or (), output, dynamic_shapes=source.dynamic_shapes)
        _wrote(output, as_json)


@app.command()
def repository(
    artefact: Annotated[Path, typer.Argument(help="model.onnx, a tensorrt engine, or a TorchScript file.")],
    root: Annotated[Path, typer.Option(help="The model repository.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    version: Annotated[int, typer.Option(help="1 or more.")] = 1,
    max_batch_size: Annotated[int, typer.Option(help="Above 0 the server batches requests.")] = 0,
    preferred: Annotated[str, typer.Option("--preferred-batch-sizes", help="As 8,16.")] = "",
    delay: Annotated[int, typer.Option("--max-queue-delay-us", help="Microseconds to wait for a batch.")] = 0,
    instances: Annotated[int, typer.Option(help="Copies on each device.")] = 1,
    kind: Annotated[str, typer.Option(help="auto, gpu or cpu.")] = "auto",
    gpus: Annotated[str, typer.Option(help="Device indices, as 0,1.")] = "",
    inputs: Annotated[Optional[list[str]], typer.Option("--input", help="TorchScript: NAME=FLOAT[-1,32].")] = None,
    outputs: Annotated[Optional[list[str]], typer.Option("--output", help="TorchScript: NAME=FLOAT[-1,8].")] = None,
    as_json: Json = False,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server. The server's own schema checks config.pbtxt.

    Example: fused-ops export repository minilm.onnx --root models --name minilm --max-batch-size 32 --preferred-batch-sizes 8,16
    """
    from ..repository.writer import export_model_repository

    with errors("export repository"):
        folder = export_model_repository(
            root, name, artefact, version=version, max_batch_size=max_batch_size, preferred_batch_sizes=_ints(preferred),
            max_queue_delay_us=delay, instances=instances, kind=kind, gpus=_ints(gpus), inputs=_ports(inputs), outputs=_ports(outputs),
        )  # fmt: skip
        show({"wrote": str(folder), "config": (folder / "config.pbtxt").read_text().splitlines()}, as_json)


def _ints(text: str) -> list[int]:
    from ..files.atomic import ExportError

    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise ExportError(f"got {text!r}, allowed: numbers with commas between") from None


def _ports(texts: Optional[list[str]]) -> Optional[dict[str, tuple[str, list[int]]]]:
    from ..files.atomic import ExportError

    ports = {}
    for text in texts or []:
        name, _, rest = text.partition("=")
        dtype, _, dims = rest.rstrip("]").partition("[")
        if not name or not dtype or not rest.endswith("]"):
            raise ExportError(f"--input, --output: got {text!r}, allowed: NAME=DTYPE[DIM,...] as INPUT__0=FLOAT[-1,32]")
        ports[name] = (dtype, _ints(dims))
    return ports or None
