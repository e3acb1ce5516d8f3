"""The package's logger, and warnings given once a process."""

from __future__ import annotations

import functools
import logging

LOGGER = logging.getLogger("fused_ops")


@functools.cache
def warn_once(op: str, reason: str) -> None:
    """Warn, once a process for each op and reason, that something other than the kernel runs."""
    LOGGER.warning("fused_ops: %s: %s. fused_ops.explain() and `fused-ops doctor` tell more", op, reason)
