"""Device properties that choose a kernel's configuration, and the dtypes that kernels take."""

from __future__ import annotations

import functools

import torch

from . import settings

INTERPRETER_CAPABILITY = (9, 0)  # what a configuration is chosen for when kernels are interpreted
INTERPRETER_SMS = 4

FP8 = torch.float8_e4m3fn
KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


@functools.cache
def _cuda_properties(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def properties_of(device: int) -> tuple[tuple[int, int], int]:
    """(capability, SM count) of a GPU by its index. -1 is the CPU: stand-ins for the interpreter."""
    return _cuda_properties(device) if device >= 0 else (INTERPRETER_CAPABILITY, INTERPRETER_SMS)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return settings.INTERPRET
