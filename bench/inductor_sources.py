"""The Triton kernels that Inductor wrote during a run, kept: without a GPU it writes none, and they are what ours are held to."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from .files import read
from .results_format import MAX_BYTES, write_whole

NAME = "inductor.jsonl"
MARK = "async_compile.triton("  # in the code of a graph, before each kernel's source


def gather(cache: Path, target: Path, most: int = MAX_BYTES) -> int:
    """Write the code of each graph in Inductor's cache that has Triton kernels to target, a JSON object a line: file, source.

    The oldest first, each text once, until target would have more than most bytes. Returns how many were written; without any,
    no file is.
    """
    found: dict[str, str] = {}
    size = 0
    for path in sorted(cache.rglob("*.py"), key=_age):
        with contextlib.suppress(OSError, ValueError):  # a process that compiles may take its files away
            text = read(path).decode()
            if MARK in text and text not in found.values():
                line = json.dumps({"file": path.name, "source": text})
                if size + len(line) + 1 > most:
                    break
                size += len(line) + 1
                found[line] = text
    if found:
        write_whole(target, "".join(f"{line}\n" for line in found).encode())
    return len(found)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
