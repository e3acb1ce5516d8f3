"""The interpreter that the tests use is Triton's: equal bits, and triton.language is as it was after each launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fused_ops import fused_layernorm, fused_linear, fused_softmax
from tests import quick_interpreter


def _language() -> dict[tuple[Any, str], Any]:
    return {(of, name): value for of in quick_interpreter.REPLACED_IN for name, value in vars(of).items()}


def _results() -> list[Tensor]:
    """Device functions that call others, descriptors, products, sums, erf and exp, forward and backward."""
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(shape, generator=generator).half().requires_grad_() for shape in ((40, 24), (48, 24), (48,))]
    y = fused_layernorm(fused_softmax(fused_linear(*leaves, "gelu")), (48,), leaves[2])
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


def test_equal_bits_and_nothing_left_behind() -> None:
    assert interpreter._patch_lang is quick_interpreter._patch_lang
    with quick_interpreter.tritons_own():
        assert interpreter._patch_lang.__module__ == interpreter.__name__
        theirs = _results()
    assert interpreter._patch_lang is quick_interpreter._patch_lang
    before = _language()
    ours = _results()
    after = _language()
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_every_bf16_converts_as_before() -> None:
    """In blocks with subnormal numbers, without, and with both, which take different ways; of fp32, with several lower halves."""
    assert interpreter._convert_float.__module__ == quick_interpreter.__name__
    upper = np.arange(2**16, dtype=np.uint16)
    lower = np.array([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1], dtype=np.uint32)
    longer = (np.left_shift(upper, 16, dtype=np.uint32)[:, None] | lower).view(np.float32)
    for numbers, types in ((upper, (tl.bfloat16, tl.float32)), (longer, (tl.float32, tl.bfloat16))):
        with quick_interpreter.tritons_own():
            theirs = interpreter._convert_float(numbers, *types, None)
        exponents = (numbers.view(f"u{numbers.itemsize}") >> (7 if types[0] is tl.bfloat16 else 23)) & 255
        for block in (exponents == 0, exponents != 0, exponents == exponents):
            ours = interpreter._convert_float(numbers[block], *types, None)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs[block])
