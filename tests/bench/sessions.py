"""Several sessions of pytest one after the other in one process, which imports torch once. Run as a program:

python -m tests.bench.sessions "ARGUMENTS OF PYTEST"...

The exit status is that of the first session that is not 0.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import pytest


def command(*sessions: Sequence[str]) -> list[str]:
    """The command line. Without hypothesis, which takes seconds to import and is of no use to a benchmark."""
    words = (shlex.join(["-q", "-p", "no:hypothesispytest", *session]) for session in sessions)
    return [sys.executable, "-m", "tests.bench.sessions", *words]


if __name__ == "__main__":
    sys.exit(next((int(status) for words in sys.argv[1:] if (status := pytest.main(shlex.split(words)))), 0))
