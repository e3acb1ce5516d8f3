"""The clock of `python -m tests.mutate`: how long a mutant's tests ran, and when they hang. No test reads it."""

from __future__ import annotations

import time

seconds = time.monotonic
