"""Load saved ExportedPrograms without unpickling."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .atomic import ExportError, PathLike, check_input

MAX_BYTES = 64 * 2**30
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load then unpickles tensors and built-in containers only
_LOCK = threading.Lock()


def load_program(path: PathLike, op: str = "load") -> ExportedProgram:
    """Load a saved ExportedProgram, but refuse a file that torch.export.load would unpickle or execute parts of.

    Refused are custom objects, pickled weights and compiled code. A program is still code: its graph calls torch's
    operators, and torch evaluates its symbolic expressions. Load only files that you, or somebody you trust, saved.

    Raises:
        ExportError: the file is no ExportedProgram, or it holds pickled or compiled objects.
    """
    source = check_input(op, path, max_bytes=MAX_BYTES)
    refused = [
        name for name in _members(op, source) if "custom_obj_" in name or "opaque_obj_" in name or "/aotinductor/" in name
    ]
    if refused:
        raise ExportError(
            f"{op}: {str(source)!r}: holds {refused[0]!r}, allowed: tensors and a graph, no pickled or compiled objects"
        )
    with _LOCK:  # the environment belongs to the whole process
        before = os.environ.get(FORCE)
        os.environ[FORCE] = "1"
        try:
            program = torch.export.load(source)
        except Exception as error:
            first = str(error).strip().splitlines()
            raise ExportError(
                f"{op}: {str(source)!r} is no ExportedProgram of tensors: {first[0] if first else error!r}"
            ) from None
        finally:
            if before is None:
                del os.environ[FORCE]
            else:
                os.environ[FORCE] = before
    return program


def _members(op: str, source: Path) -> list[str]:
    """The names of the archive's files, listed by the reader that torch.export.load uses."""
    from torch.export.pt2_archive._package import PT2ArchiveReader

    try:
        with PT2ArchiveReader(str(source)) as reader:
            return list(reader.get_file_names())
    except Exception as error:
        raise ExportError(f"{op}: {str(source)!r} is no ExportedProgram: {str(error).splitlines()[0]}") from None
