"""AOTInductor: a compiled package (.pt2) that Python and C++ load without fused_ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .files.atomic import ExportError, PathLike, check_writable, output
from .files.manifest import write_manifest
from .program import Args, exported_program, quiet


def export_aoti(
    model: nn.Module | ExportedProgram,
    args: Args,
    path: PathLike,
    *,
    dynamic_shapes: Any = None,
    options: dict[str, Any] | None = None,
) -> Path:
    """Compile a model ahead of time for the device its parameters are on, as an AOTInductor package.

    Args:
        model: a module, fused or not, or an ExportedProgram. A module is exported in eval mode, and its own mode is
            restored. The operators of fused_ops are replaced by their ATen references, which Inductor fuses itself.
        args: example inputs: a tuple, a dict of keyword inputs, or one tensor. Empty for an ExportedProgram.
        path: the file to write; its name ends in ".pt2". It appears whole, or not at all.
        dynamic_shapes: as torch.export's; a string names a dimension of any size.
        options: Inductor's configuration for this compilation.

    Returns:
        The absolute path. Load it with torch._inductor.aoti_load_package(path), or in C++ with
        torch::inductor::AOTIModelPackageLoader. It needs the same torch release and kind of device.

    Raises:
        ExportError: a bad argument, or a model that does not compile; nothing is written.
    """
    op = "export_aoti"
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise TypeError(f"{op}: model: got {type(model).__name__}, allowed: a torch.nn.Module or an ExportedProgram")
    target = check_writable(op, path)
    if target.suffix != ".pt2":
        raise ExportError(f"{op}: path: got {target.name!r}, allowed: a name that ends in '.pt2'")
    program = exported_program(op, model, args, dynamic_shapes)
    with output(op, target) as staged:
        try:
            with quiet(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(program, package_path=str(staged), inductor_configs=options)
        except Exception as error:
            raise ExportError(f"{op}: AOTInductor cannot compile the model: {error}") from error
        write_manifest(staged, "aoti", options={key: str(value) for key, value in (options or {}).items()})
    return target
