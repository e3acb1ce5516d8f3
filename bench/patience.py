"""An end for what takes too long, or never ends, so that one measurement cannot take the time of all that follow."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

HANG_FACTOR = 2
"""A call that gives Python no chance to stop it for so many times the patience ends the process."""


class TooSlow(Exception):  # noqa: N818 - the ordinary end of a provider that tunes for minutes
    """A measurement took longer than was allowed."""


@contextlib.contextmanager
def at_most(seconds: float, last_words: Callable[[str], Any], status: int) -> Iterator[None]:
    """Raise TooSlow in the main thread after seconds; 0 allows any time.

    Where nothing in Python can be interrupted, because a kernel does not end, the process ends after HANG_FACTOR times the
    seconds: last_words(reason) is called in another thread, and status is the exit status. Needs the main thread.
    """
    if not seconds:
        yield
        return

    def slow(*_: Any) -> None:
        raise TooSlow(f"took more than {seconds:g} s")

    def hung() -> None:
        try:
            last_words(f"hang: no answer in {HANG_FACTOR * seconds:g} s")
        finally:
            os._exit(status)

    watchdog = threading.Timer(HANG_FACTOR * seconds, hung)
    watchdog.daemon = True
    before = signal.signal(signal.SIGALRM, slow)
    watchdog.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watchdog.cancel()
