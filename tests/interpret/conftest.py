"""The Triton kernels themselves, in Triton's interpreter: run with TRITON_INTERPRET=1 (one mode a process)."""

from __future__ import annotations

import os

from fused_ops._runtime import settings

os.environ.setdefault("TRITON_INTERPRET", "0")
collect_ignore_glob = [] if settings.INTERPRET else ["*"]
