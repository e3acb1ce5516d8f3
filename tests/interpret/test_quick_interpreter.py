"""The interpreter that the tests use is Triton's: equal bits, and triton.language is as it was after each launch."""

from __future__ import annotations

from typing import Any

import torch
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
