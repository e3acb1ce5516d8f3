"""Every environment variable that fused_ops reads. Switches are read once, at the first import; folders at each call."""

from __future__ import annotations

import os
from pathlib import Path

TRUE_WORDS = ("1", "true", "yes", "on", "y")


def _switch(name: str, default: str = "0") -> bool:
    return os.environ.get(name, default).lower() in TRUE_WORDS


BACKEND = os.environ.get("FUSED_OPS_BACKEND", "auto")  # "auto", "triton" or "aten"
LAUNCH = os.environ.get("FUSED_OPS_LAUNCH", "auto")  # "auto", or "triton": every launch through kernel[grid]
INTERPRET = _switch("TRITON_INTERPRET")  # CPU tensors run the kernels in Triton's interpreter
NVTX = _switch("FUSED_OPS_NVTX")  # an NVTX range around every raw operator
INLINE = _switch("FUSED_OPS_INLINE")  # AOTAutograd traces into the launches
CLUSTER = _switch("FUSED_OPS_CLUSTER", "1")  # long rows may run as clusters
COMPILE_WITH_ATEN = frozenset(filter(None, os.environ.get("FUSED_OPS_COMPILE_WITH_ATEN", "").replace(" ", "").split(",")))
if BACKEND not in ("auto", "triton", "aten"):
    raise ValueError(f"FUSED_OPS_BACKEND: got {BACKEND!r}, allowed are 'auto', 'triton', 'aten'")
if LAUNCH not in ("auto", "triton"):
    raise ValueError(f"FUSED_OPS_LAUNCH: got {LAUNCH!r}, allowed are 'auto', 'triton'")


def user_folder() -> Path:
    """Where the user's tables of configurations are: $FUSED_OPS_CACHE, else fused_ops in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("FUSED_OPS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_ops"


def triton_cache() -> Path:
    """Where Triton keeps compiled kernels."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def inductor_cache() -> Path:
    """Where Inductor keeps compiled graphs."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(folder)
    import getpass
    import tempfile

    return Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"


def cxx() -> str:
    """The C++ compiler's command, by $CXX or the usual name."""
    return (os.environ.get("CXX", "").split() or ["c++"])[0]


def compiling_environment() -> dict[str, str]:
    """The environment for a process that compiles kernels: this one's, without the interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
