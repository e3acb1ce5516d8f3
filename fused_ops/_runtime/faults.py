"""An error at a launch says which launch raised it: kernel, grid, sizes and configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BEGINNING = "while launching"
# What CUDA reports at the next call, whichever that is, after a kernel has failed.
_LATE = ("illegal memory access", "misaligned address", "illegal instruction", "launch failure", "device-side assert",
         "invalid program counter", "illegal address", "stack error")  # fmt: skip


def describe(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """One line: kernel[(grid,)], its device, its tensors' dtypes and shapes, its sizes, and every keyword argument."""
    device = next((f" on {arg.device}" for arg in args if isinstance(arg, Tensor)), "")
    names = getattr(kernel, "arg_names", None) or [f"argument {i}" for i in range(len(args))]
    values = [f"{name}={_shown(arg)}" for name, arg in (*zip(names, args), *kwargs.items())]
    return f"{_BEGINNING} {name_of(kernel)}[({grid},)]{device}: {' '.join(values)}"


def name_of(kernel: Any) -> str:
    """The name of a kernel's function."""
    return getattr(kernel, "__name__", None) or getattr(getattr(kernel, "fn", None), "__name__", None) or repr(kernel)


def _shown(value: Any) -> str:
    return f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else str(value)


def name_launch(error: Exception, kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Add which launch raised error to its message, on a line of its own; its type stays, and what else it holds.

    Errors whose message is not their one argument (Triton's own) get a note instead, from Python 3.11 on. Nothing is added
    twice, and no error is raised here.
    """
    try:
        text = str(error)
        if _BEGINNING in text or any(_BEGINNING in note for note in getattr(error, "__notes__", ())):
            return
        said = describe(kernel, grid, args, kwargs) + _hint(text)
        if error.args == (text,):
            error.args = (f"{text}\n{said}",)
        elif hasattr(error, "add_note"):
            error.add_note(said)
    except Exception:  # the error itself matters more
        return


def _hint(text: str) -> str:
    if any(words in text for words in _LATE):
        return "\nCUDA may report the fault of an earlier kernel here: CUDA_LAUNCH_BLOCKING=1 tells which"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "\na CUDA graph is being captured: make the same call once before the capture, which loads the kernel"
    return ""
