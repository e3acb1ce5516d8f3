"""Files that a user names, or that lie in a user's folder, opened for reading: regular files, and nothing that can be waited for."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFLNK: "a symbolic link",
}  # fmt: skip
_FLAGS = ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")


class NotRegularError(OSError):
    """A path names no regular file; strerror says what it names."""


class TooLargeError(OSError):
    """A file has more bytes than its format can sensibly have; strerror has both numbers."""


def open_regular(path: str | os.PathLike[str], *, max_bytes: int | None = None, links: bool = True) -> BinaryIO:
    """A regular file, opened for reading bytes.

    The path is looked at first, so that no device is opened. Then the open file is, in whose place nothing can be put: it was
    opened without waiting for the other end of a FIFO.

    Args:
        path: the file.
        max_bytes: refuse a larger one.
        links: whether path may be a symbolic link.

    Raises:
        NotRegularError: path names a folder, a FIFO, a socket, a device, or a symbolic link where none may be.
        TooLargeError: the file has more than max_bytes.
        OSError: it is not there, or cannot be read.
        ValueError: path holds a null byte.
    """
    name = os.fspath(path)
    _require_regular(name, os.stat(name, follow_symlinks=links))
    flags = sum(getattr(os, flag, 0) for flag in (*_FLAGS, *(() if links else ("O_NOFOLLOW",))))
    file = open(name, "rb", opener=lambda name, read: os.open(name, read | flags))  # noqa: SIM115
    try:
        info = os.fstat(file.fileno())
        _require_regular(name, info)
        if max_bytes is not None and info.st_size > max_bytes:
            raise TooLargeError(errno.EFBIG, f"{info.st_size} bytes, allowed: {max_bytes}", name)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], *, max_bytes: int, links: bool = True) -> bytes:
    """The bytes of a regular file, as open_regular; TooLargeError also where it grows while it is read."""
    with open_regular(path, max_bytes=max_bytes, links=links) as file:
        return read_open(file)


def read_open(file: BinaryIO) -> bytes:
    """The bytes of a file that open_regular opened; TooLargeError where it grows meanwhile."""
    size = os.fstat(file.fileno()).st_size
    data = file.read(size + 1)  # read() of a larger number would ask for so much memory
    if len(data) > size:
        raise TooLargeError(errno.EFBIG, "it grew while it was read", file.name)
    return data


def _require_regular(name: str, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        kind = KINDS.get(stat.S_IFMT(info.st_mode), "of another kind")
        raise NotRegularError(errno.EINVAL, f"{kind}, allowed: a regular file", name)
