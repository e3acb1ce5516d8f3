"""Softmax in ATen: what the kernels are held to, and what runs where no kernel does.

One call of ATen's softmax is not always within the numerics contract. It rounds its input to the dtype of the result first; it
rounds twice in half precision over a dimension that is not the last; and on a CPU it adds the terms one after the other, so that
the roundings of equal terms, as masks and integers have them, add up. There, and only there, more than one call is made.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

EXACT_IN_FP32 = frozenset((
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16,
))  # fmt: skip
"""The dtypes whose every value is a float32."""
REALS = EXACT_IN_FP32 | {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64}
ONE_CALL = {
    torch.float32: (64, 2048),
    torch.float16: (0, 2048),
    torch.bfloat16: (0, 2048),
    torch.float64: (1 << 62, 1 << 62),
}
"""The most terms, over a dimension that is not the last and over the last, of which one call of ATen's softmax on a CPU, from a
dtype to the same, is within the contract. N equal terms added one after the other in fp32 err by up to N / 2 units, and 4 sqrt(N)
are allowed; over the last dimension the lanes of a vector, four or more, add a part each."""


def softmax_reference(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """softmax(x) over dim in ATen, within the contract; y contiguous, in dtype or x's."""
    out = x.dtype if dtype is None else dtype
    wide = _wide(x.dtype, out)
    many = _adds_many(x, dim, wide)
    if not many and x.dtype is out and dim in (-1, x.dim() - 1):
        return torch.softmax(x, dim)  # contiguous, whatever the strides of x
    y = torch.softmax(x, dim, wide)
    if many:
        y /= y.sum(dim, keepdim=True)  # which ATen adds pairwise
    return y.to(out)


def softmax_by_aten(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """softmax_reference by functions that ATen differentiates, with derivatives of every order computed in fp32 or fp64.

    A graph that is being traced depends on no size: it holds ATen's softmax and the casts that the dtypes need.
    """
    out = x.dtype if dtype is None else dtype
    wide = _wide(x.dtype, out)
    y = torch.softmax(x, dim, None if wide is x.dtype else wide)
    if _adds_many(x, dim, wide):
        y = y / y.sum(dim, keepdim=True)
    return y if wide is out else y.to(out)


def softmax_bwd_reference(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx = (dy - sum(dy * y)) * y over dim in ATen, in fp32, or fp64 where a tensor or dtype is; dx contiguous, in dtype."""
    wide = torch.float64 if torch.float64 in (dy.dtype, y.dtype, dtype) else torch.float32
    if type(y) is not Tensor or not y.is_cpu or y.ndim == 0 or y.shape[dim] <= ONE_CALL[wide][dim == -1 or dim == y.ndim - 1]:
        if dy.dtype is y.dtype is dtype is wide:
            return torch._softmax_backward_data(dy, y, dim, wide)
        return torch._softmax_backward_data(dy.to(wide), y.to(wide), dim, wide).to(dtype)
    y = y.to(wide)
    product = (dy.to(wide) * y).contiguous()
    return torch.addcmul(product, y, product.sum(dim, keepdim=True), value=-1, out=product).to(dtype)


def differentiable_bwd(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """softmax_bwd_reference by functions that ATen differentiates."""
    wide = torch.float64 if torch.float64 in (dy.dtype, y.dtype, dtype) else torch.float32
    product = dy.to(wide) * y.to(wide)
    return (product - y * product.sum(dim, keepdim=True)).to(dtype)


def _wide(dtype: torch.dtype, out: torch.dtype) -> torch.dtype:
    """What to compute in: a dtype that holds the input's every value and is no narrower than the output's."""
    return torch.float32 if dtype in EXACT_IN_FP32 and out is not torch.float64 else torch.float64


def _adds_many(x: Tensor, dim: int, wide: torch.dtype) -> bool:
    """Whether ATen's sum over dim in fp32 is one of more terms than the contract allows: on a CPU, and not in a traced graph."""
    if wide is torch.float64 or not x.is_cpu or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(x) not in (Tensor, Parameter) or x.dim() == 0:
        return False
    return x.shape[dim] > ONE_CALL[torch.float32][dim in (-1, x.dim() - 1)]
