"""A measurement that takes too long ends, and one that cannot be interrupted ends its process and says so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.patience import TooSlow, at_most

ROOT = Path(__file__).resolve().parents[2]
HANG = """
import ctypes, pathlib, sys
from bench.patience import at_most
with at_most(0.2, lambda reason: pathlib.Path(sys.argv[1]).write_text(reason), 77):
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    ctypes.CDLL(None).sleep(600)
"""


def test_the_time_that_was_allowed_ends_it() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TooSlow, match=r"took more than 0\.05 s"), at_most(0.05, lambda reason: None, 77):
        time.sleep(600)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_quick_is_left_alone() -> None:
    said: list[str] = []
    for seconds in (0.0, 600.0):
        with at_most(seconds, said.append, 77):
            pass
    assert said == []
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_cannot_be_interrupted_ends_the_process(tmp_path: Path) -> None:
    words = tmp_path / "words"
    done = subprocess.run([sys.executable, "-c", HANG, str(words)], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 77
    assert words.read_text() == "hang: no answer in 0.4 s"
