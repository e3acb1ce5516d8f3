"""Reading files that a user names, or that lie in a results folder: regular files of a sensible size, and nothing that is waited for."""

from __future__ import annotations

import io
from pathlib import Path

MAX_FILE = 256 << 20  # bytes of one table or JSON file


def read(path: Path, max_bytes: int = MAX_FILE) -> bytes:
    """The bytes of a file. Raises OSError where path is no regular file, or one of more than max_bytes."""
    from fused_ops._runtime.files import read_regular  # it imports torch: not before it is asked for

    return read_regular(path, max_bytes=max_bytes)


def read_text(path: Path, max_bytes: int = MAX_FILE) -> str:
    """The text of a file, line ends as they are. Raises OSError as read, and ValueError where it is no UTF-8."""
    return read(path, max_bytes).decode()


def lines(path: Path) -> io.StringIO:
    """The lines of a CSV file, for csv.reader. Raises as read_text."""
    return io.StringIO(read_text(path), newline="")
