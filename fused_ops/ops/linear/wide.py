"""fp32 between a product and what follows it, where ATen would round to 16 bits in between."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

HALF_DTYPES = frozenset((torch.float16, torch.bfloat16))


def is_computed(x: Tensor) -> bool:
    """Whether x is on the CPU and has values: what a compiler or an exporter traces has none."""
    return x.is_cpu and type(x) in (Tensor, Parameter)


def widens(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the product of these tensors must stay fp32 until its activation is applied, as it does in the kernels.

    So it is for 16-bit tensors on the CPU. On a GPU it would leave the tensor cores idle, and what is traced keeps its dtype.
    Tensors of unlike dtypes are for ATen to refuse.
    """
    dtype = x.dtype
    return dtype in HALF_DTYPES and is_computed(x) and all(t is None or t.dtype is dtype for t in others)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in fp32, contiguous."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).contiguous()
