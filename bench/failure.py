"""What a measuring process does with an exception: say it in a line, and end itself where CUDA is lost to it."""

from __future__ import annotations

CONTEXT_LOST = 77
"""A measuring step ends with this status when an illegal access or a hang has cost it the CUDA context: run it again with
--bench-resume --bench-after-crash."""


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of its message, at most 400 characters."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else ''}"[:400]


def exit_if_context_is_lost() -> None:
    """After an illegal access every later CUDA call of this process fails: end it, so that a new one can go on."""
    import pytest
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        pytest.exit("the CUDA context is lost", returncode=CONTEXT_LOST)
