"""Which way kernels are launched in this process, and why: `launch_path` says."""

from __future__ import annotations

import functools

from . import settings
from .backend import TRITON_INSTALLED
from .notices import warn_once

OLDEST, NEWEST = (3, 6), (3, 9)  # the Tritons whose launchers compiled.py knows

_refused: dict[str, str] = {}  # kernels whose launcher was not as known, and what it said


@functools.cache
def triton_version() -> tuple[str, tuple[int, int]]:
    """(version, (major, minor)) of the Triton that is installed. Imports it."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return triton.__version__, (int(major), int(minor))


def takes_fast_path() -> bool:
    """Whether compiled kernels are launched past Triton's front end. Needs Triton."""
    return settings.LAUNCH == "auto" and OLDEST <= triton_version()[1] <= NEWEST


def launch_path() -> tuple[str, str]:
    """(way, reason) of the launches on a GPU in this process.

    way: "fast path" (a warm launch calls Triton's launcher, past its front end), "kernel[grid]" (every launch goes through
    all of Triton), "interpreter", or "none" where Triton is missing or broken. Launches nothing.
    """
    if not TRITON_INSTALLED:
        return "none", "Triton is not installed"
    if settings.INTERPRET:
        return "interpreter", "TRITON_INTERPRET is set"
    try:
        version = triton_version()[0]
    except Exception as error:  # whatever a broken installation raises
        return "none", f"Triton cannot be imported: {type(error).__name__}: {error}"
    if settings.LAUNCH == "triton":
        return "kernel[grid]", "FUSED_OPS_LAUNCH=triton"
    if not takes_fast_path():
        known = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
        return "kernel[grid]", f"the fast path knows the launchers of Triton {known}, not that of {version}"
    if _refused:
        return "fast path", f"known for Triton {version}; not for {', '.join(_refused)}: {next(iter(_refused.values()))}"
    return "fast path", f"known for Triton {version}; FUSED_OPS_LAUNCH=triton turns it off"


def note_refusal(kernel: str, error: Exception) -> None:
    """Remember, and warn once, that the launcher of a kernel is not the one that is known."""
    if kernel not in _refused:
        _refused[kernel] = f"{type(error).__name__}: {error}"
        warn_once(kernel, f"launched through kernel[grid], for its launcher is not as known ({_refused[kernel]})")
