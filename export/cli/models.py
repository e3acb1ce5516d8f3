"""The commands `fused-ops verify`, `quantize` and `inspect`, and the group `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer
from rich.console import Console

from ..files.atomic import ExportError, open_input, read_input, require
from . import exports
from .exports import Fuse, Hf, Inputs, Json, Model
from .sources import Source, errors, load_source, parse_sizes, show

MAX_NPZ_BYTES = 2**34
MAX_TEXT_BYTES = 2**30


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.add_typer(exports.app, name="export")
    app.command()(verify)
    app.command()(quantize)
    app.command()(inspect)


def verify(
    path: Annotated[Path, typer.Argument(help="ONNX, TorchScript, AOTInductor package, or engine (needs a GPU).")],
    model: Model = None, hf: Hf = None, inputs: Inputs = None, fuse: Fuse = False,
    sizes: Annotated[
        Optional[list[str]], typer.Option("--size", help="batch=3,sequence=40; repeat. By default two unlike the exported ones.")
    ] = None,
    max_relative_error: Annotated[Optional[float], typer.Option(help="By default according to the file's precision.")] = None,
    min_cosine: Annotated[Optional[float], typer.Option(help="Likewise.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare an exported file with the module it came from, at other shapes. Exits with 1 if they differ.

    Example: fused-ops verify minilm.onnx --hf ./minilm --size batch=3,sequence=40
    """
    from ..verification.verifier import verify as compare

    with errors("verify"):
        source = load_source(model, hf, None, inputs or (), fuse=fuse)
        examples = [source.example(**each) for each in _sizes(source, sizes or [])]
        report = compare(path, source.model, examples, max_relative_error=max_relative_error, min_cosine=min_cosine)
        if as_json:
            typer.echo(json.dumps(report.as_dict(), indent=1))
        else:
            _print(report)
        raise typer.Exit(report.exit_status)


def _sizes(source: Source, texts: list[str]) -> list[dict[str, int]]:
    chosen = [parse_sizes(text) for text in texts]
    unknown = sorted({name for each in chosen for name in each} - source.dims.keys())
    if unknown:
        raise ExportError(f"--size: got {unknown[0]!r}, allowed: {', '.join(source.dims) or 'none: every dimension is static'}")
    return chosen or [
        {name: size + 1 for name, size in source.dims.items()},
        {name: 2 * size + 3 for name, size in source.dims.items()},
    ]


def _print(table: Any) -> None:
    """Print a rich table. A pipe has no width, so there the table gets 160 columns and is not folded."""
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def quantize(
    path: Annotated[Path, typer.Argument(help="The fp32 ONNX file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The INT8 file to write.")],
    calibration: Annotated[Optional[list[Path]], typer.Option(help=".npz files, one a batch: arrays by input name.")] = None,
    text: Annotated[
        Optional[Path], typer.Option(help="Instead: sentences, one a line, tokenised with --hf's tokenizer.")
    ] = None,
    hf: Hf = None,
    method: Annotated[str, typer.Option(help="minmax, percentile or entropy.")] = "minmax",
    include: Annotated[Optional[list[str]], typer.Option(help="Linears to quantise, as encoder.layer.*; repeat.")] = None,
    exclude: Annotated[Optional[list[str]], typer.Option(help="Linears to leave, likewise.")] = None,
    percentile: Annotated[float, typer.Option(help="Per cent of the magnitudes inside the range.")] = 99.99,
    bins: Annotated[int, typer.Option(help="Of the histograms.")] = 2048,
    held_out: Annotated[float, typer.Option(help="Share of the batches kept from calibration, to measure on.")] = 0.25,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Show what each linear costs alone; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantise an ONNX file to INT8 (QDQ) by calibration, and measure the result on batches held out from calibration.

    Example: fused-ops quantize minilm.onnx -o minilm-int8.onnx --text sentences.txt --hf ./minilm --exclude '**.output.dense'
    """
    from ..quantize import quantizer as quantisation

    with errors("quantize"):
        batches = _batches(calibration or [], text, hf)
        kept = round(len(batches) * held_out)
        if not 0 <= held_out < 1 or kept >= len(batches):
            raise ExportError(
                f"--held-out: got {held_out} of {len(batches)} batches, allowed: from 0, leaving one to calibrate on"
            )
        options: dict[str, Any] = {
            "method": method, "include": include or None, "exclude": exclude or (), "percentile": percentile, "bins": bins,
            "evaluation": batches[-kept:] if kept else None, "progress": not as_json,
        }  # fmt: skip
        used = batches[: len(batches) - kept]
        if sensitivity:
            found = quantisation.sensitivity(path, used, **options)
            typer.echo(json.dumps(found.as_dict(), indent=1)) if as_json else _print(found.table())
            return
        report = quantisation.quantize_onnx(path, output, used, **options)
        if as_json:
            typer.echo(json.dumps(report.as_dict(), indent=1))
            return
        cosine = (
            f"mean {report.cosine_mean:.4f}, min {report.cosine_min:.4f} over {kept} held-out batches"
            if kept
            else "not measured"
        )
        details = {"wrote": report.path, "bytes": output.stat().st_size, "before": path.stat().st_size, "method": report.method}
        counts = {
            "quantized": f"{len(report.quantized)} linears",
            "kept": f"{len(report.kept)} linears",
            "cosine to fp32": cosine,
        }
        show(details | counts, False)


def _batches(files: list[Path], text: Optional[Path], hf: Optional[Path]) -> list[dict[str, Any]]:
    """Calibration batches as dicts of arrays by input name: one for each .npz file (read without pickle), or each sentence."""
    if bool(files) == (text is not None):
        raise ExportError("--calibration, --text: got both or none, allowed: one of them")
    if text is None:
        batches = []
        for file in files:
            with open_input("--calibration", file, max_bytes=MAX_NPZ_BYTES, argument="file") as source:
                try:
                    with np.load(source, allow_pickle=False) as arrays:
                        batches.append({name: arrays[name] for name in arrays.files})
                except Exception as error:  # numpy's and zipfile's have many types
                    raise ExportError(f"--calibration: {str(file)!r} is no .npz file of numeric arrays: {error}") from None
        return batches
    if hf is None:
        raise ExportError("--text: got no --hf, allowed: with the folder of a tokenizer.json")
    tokenizers = require("tokenizers", "demo")
    content = read_input("--hf", hf / "tokenizer.json", max_bytes=MAX_TEXT_BYTES, argument="tokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises no other type
        raise ExportError(f"--hf: {str(hf / 'tokenizer.json')!r} is no tokenizer: {error}") from None
    try:
        lines = read_input("--text", text, max_bytes=MAX_TEXT_BYTES, argument="file").decode().splitlines()
    except UnicodeDecodeError as error:
        raise ExportError(f"--text: {str(text)!r}: got {error}, allowed: UTF-8") from None
    encoded = [tokenizer.encode(line) for line in lines if line.strip()]
    return [{"input_ids": np.array([e.ids]), "attention_mask": np.array([e.attention_mask])} for e in encoded]


def inspect(
    path: Annotated[Path, typer.Argument(help="ONNX, engine, TorchScript, AOTInductor package, ExportedProgram.")],
    as_json: Json = False,
) -> None:
    """Describe a file: operators, dimensions, dtypes, size, hash, engine options. Nothing in it is run or unpickled.

    Example: fused-ops inspect minilm.engine
    """
    from ..inspect import inspect_file

    with errors("inspect"):
        details = inspect_file(path)
        show(details, as_json)
        raise typer.Exit(1 if details["manifest"] == "differs" else 0)
