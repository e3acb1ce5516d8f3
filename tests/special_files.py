"""What a path may name that is no regular file, and a limit that makes a test fail which waits for one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 120  # no reader waits at all: a busy machine needs some
DEVICE = Path("/dev/zero")  # endless


def make_socket(path: Path) -> None:
    """A socket at path, whose absolute name may be longer than a socket's may."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


KINDS: dict[str, Callable[[Path], Any]] = {
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to(DEVICE),
    "FIFO behind a link": lambda path: (os.mkfifo(f"{path}.fifo"), path.symlink_to(f"{path}.fifo")),
}


class WaitedError(BaseException):
    """What was called has waited for a file; no handler of exceptions takes this for its own."""


@contextlib.contextmanager
def not_waiting() -> Iterator[None]:
    """Raise WaitedError in the block after SECONDS, also where it hangs in opening or reading a file."""

    def stop(*_: object) -> None:
        raise WaitedError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
