"""Load what commands work on: models by name, and example inputs from a text such as 'x=float32[batch:2,16]'."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import typer
from torch import Tensor, nn

from ..files.atomic import ExportError, check_regular, require

HF_INPUTS = ("input_ids=int64[batch:2,sequence:16]<{vocabulary}", "attention_mask=int64[batch:2,sequence:16]<2")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool,
)}  # fmt: skip
INPUT = re.compile(r"(?P<name>\w+)=(?P<dtype>\w+)\[(?P<dims>[^\]]*)\](?:<(?P<below>\d+))?")
DIM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*):)?(?P<size>\d+)")


@dataclass(frozen=True)
class InputSpec:
    """One input. dims: (name, or "" if static; example size) of each dimension. below: integers are drawn from [0, below)."""

    name: str
    dtype: torch.dtype
    dims: tuple[tuple[str, int], ...]
    below: int

    def example(self, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
        """A random tensor. sizes overrides the sizes of named dimensions.

        An input of zeros and ones is taken for a mask, and each row starts with a one so that no row is masked entirely.
        """
        shape = [sizes.get(name, size) for name, size in self.dims]
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(self.dtype)
        values = torch.randint(0, self.below, shape, generator=generator)
        if self.below == 2 and values.dim():
            values[..., :1] = 1
        return values.to(self.dtype)

    @property
    def dynamic(self) -> dict[int, str]:
        return {axis: name for axis, (name, _) in enumerate(self.dims) if name}


@dataclass(frozen=True)
class Source:
    """A model and its inputs. An ExportedProgram brings its own inputs and dynamic shapes, so `inputs` is empty for it."""

    model: Any
    inputs: tuple[InputSpec, ...]

    def example(self, **sizes: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {spec.name: spec.example(sizes, generator) for spec in self.inputs}

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, str]] | None:
        shapes = {spec.name: spec.dynamic for spec in self.inputs}
        return shapes if any(shapes.values()) else None

    @property
    def dims(self) -> dict[str, int]:
        """Named dimensions and their example sizes."""
        return {name: size for spec in self.inputs for name, size in spec.dims if name}


def parse_input(text: str) -> InputSpec:
    """Parse 'x=float32[batch:2,sequence:8,32]' or 'ids=int64[batch:2]<30522'; ExportError for any other form.

    A named dimension is dynamic, and the number behind its name is its example size. <N limits integers to values below N.
    """
    match = INPUT.fullmatch(text.replace(" ", ""))
    dims = [DIM.fullmatch(dim) for dim in match["dims"].split(",") if dim] if match else []
    if match is None or not all(dims) or match["dtype"] not in DTYPES:
        raise ExportError(
            f"--input: got {text!r}, allowed: NAME=DTYPE[DIM,...] with DIM a number or name:number and DTYPE one of"
            f" {', '.join(DTYPES)}; integers take <N behind for values below N"
        )
    sizes = tuple((dim["name"] or "", int(dim["size"])) for dim in dims if dim)
    return InputSpec(match["name"], DTYPES[match["dtype"]], sizes, max(int(match["below"] or 2), 1))


def parse_sizes(text: str) -> dict[str, int]:
    """Parse 'batch=3,sequence=40' to {"batch": 3, "sequence": 40}; ExportError for any other form."""
    try:
        sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ExportError(f"--size: got {text!r}, allowed: NAME=NUMBER,... as batch=3,sequence=40") from None
    return sizes


def load_source(
    model: Optional[str], hf: Optional[Path], program: Optional[Path], inputs: Sequence[str], *, fuse: bool = False
) -> Source:
    """The model that exactly one of --model, --hf and --program names, in eval mode.

    Raises:
        ExportError: none or several are given, the model cannot be imported or is no module, or its inputs are missing.
    """
    if sum(source is not None for source in (model, hf, program)) != 1:
        raise ExportError("got none or several of --model, --hf, --program, allowed: exactly one")
    specs = [parse_input(text) for text in inputs]
    if program is not None:
        from ..files.pt2 import load_program

        if specs or fuse:
            raise ExportError("--input, --fuse: not possible with --program: an ExportedProgram has its inputs and its graph")
        return Source(load_program(program, "--program"), ())
    if hf is not None:
        module, vocabulary = _hugging_face(hf)
        specs = specs or [parse_input(text.format(vocabulary=vocabulary)) for text in HF_INPUTS]
    else:
        module = _from_factory(str(model))
        if not specs:
            raise ExportError("--input: got none, allowed: one for each input, as --input 'x=float32[batch:2,32]'")
    _check_names(module, specs)
    if fuse:
        from ... import fuse as fuse_model

        fuse_model(module)
    return Source(module.eval(), tuple(specs))


def _check_names(module: nn.Module, specs: Sequence[InputSpec]) -> None:
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    wrong = [spec.name for spec in specs if spec.name not in parameters]
    if wrong:
        raise ExportError(f"--input: got {wrong[0]!r}, allowed: the arguments of the model's forward: {', '.join(parameters)}")


def _hugging_face(folder: Path) -> tuple[nn.Module, int]:
    """(model, vocabulary size) of a local Hugging Face folder. Only safetensors are read; no code of the folder is run."""
    transformers = require("transformers", "demo")
    if not (folder / "config.json").exists():
        raise ExportError(f"--hf: got {str(folder)!r}, allowed: a folder with config.json and model.safetensors")
    for file in sorted(folder.iterdir()):  # transformers waits for what is no regular file
        if file.exists() and not file.is_dir():
            check_regular("--hf", file, argument="file")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own deprecations
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        module = transformers.AutoModel.from_pretrained(str(folder), attn_implementation="eager", **options)
    except Exception as error:  # safetensors' own, besides transformers'
        raise ExportError(f"--hf: {str(folder)!r}: {(str(error).splitlines() or [repr(error)])[0]}") from None
    return module, int(getattr(module.config, "vocab_size", 2))


def _from_factory(name: str) -> nn.Module:
    """The module that 'package.module:factory' names: a torch.nn.Module, or a callable without arguments that returns one."""
    package, _, attribute = name.partition(":")
    if not package or not attribute:
        raise ExportError(f"--model: got {name!r}, allowed: package.module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        found = importlib.import_module(package)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ExportError(f"--model: got {name!r}: {error}") from None
    made: Any = found if isinstance(found, nn.Module) else found() if callable(found) else found
    if not isinstance(made, nn.Module):
        raise ExportError(
            f"--model: {name!r} gave {type(made).__name__}, allowed: a torch.nn.Module, or a callable that returns one"
        )
    return made


@contextlib.contextmanager
def errors(command: str) -> Iterator[None]:
    """Turn an error that the user can fix into one line on stderr and exit status 2; any other error keeps its traceback."""
    try:
        yield
    except (ExportError, ModuleNotFoundError) as error:
        typer.echo(f"fused-ops {command}: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"fused-ops {command}: cancelled, nothing was written", err=True)
        raise typer.Exit(130) from None


def show(details: dict[str, Any], as_json: bool) -> None:
    """Print details as JSON, or as an aligned list of name and value."""
    if as_json:
        typer.echo(json.dumps(details, indent=1, default=str))
        return
    width = max(map(len, details))
    for name, value in details.items():
        lines = _lines(value)
        typer.echo(f"{name:<{width}}  {lines[0]}")
        for line in lines[1:]:
            typer.echo(f"{'':<{width}}  {line}")


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) or "none"]
    if isinstance(value, (list, tuple)):
        return [line for entry in value for line in _lines(entry)] or ["none"]
    return [str(value)]


def _text(value: Any) -> str:
    """A value as text. A profile's (min, opt, max) shapes are written as by trtexec: 1x16 8x16 32x16."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, (list, tuple)) for entry in value):
        return " ".join("x".join(map(str, shape)) for shape in value)
    return str(value)
