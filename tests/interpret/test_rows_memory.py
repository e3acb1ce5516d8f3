"""No variant of the row kernels touches a byte outside its tensors: each lies at the end of what may be read."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops.testing import assert_within_contract, watch_launches
from tests.interpret.row_variants import LAYER_NORM_CONFIGS, SOFTMAX_CONFIGS


def _at_the_end_of_a_page(values: Tensor) -> tuple[Tensor, mmap.mmap]:
    """A copy of values whose last byte is the last one that may be read, with an unreadable page behind it."""
    page = mmap.PAGESIZE
    size = -(-values.numel() * values.element_size() // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for start in (address, address + page + size):
        assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) == 0
    offset = page + size - values.numel() * values.element_size()
    tensor = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    tensor.copy_(values)
    return tensor, memory


def _in_a_child(function: Callable[[], None]) -> int:
    """The exit status of function run in a forked process, which may die of a read outside its memory."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        status = 1
        try:
            torch.set_num_threads(1)  # those of the process that forked are not here: work given to them would wait for ever
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("variant", SOFTMAX_CONFIGS)
@pytest.mark.parametrize("N", [197, 200, 255])
def test_softmax_reads_nothing_outside_its_input(force: Any, variant: str, N: int) -> None:
    from fused_ops.kernels.softmax import softmax

    force(softmax, "softmax_fwd_config", SOFTMAX_CONFIGS[variant])
    force(softmax, "softmax_bwd_config", SOFTMAX_CONFIGS[variant])
    spec = REGISTRY["softmax"]

    def run() -> None:
        x, _kept = _at_the_end_of_a_page(torch.randn(5, N).half())
        y = spec.fwd(x, 1, None)
        (expected,) = spec.bound(x, 1, None)
        assert_within_contract(y, expected)
        dy, _kept2 = _at_the_end_of_a_page(torch.randn(5, N).half())
        y, _kept3 = _at_the_end_of_a_page(y)
        (expected,) = spec.raw[1].bound(dy, y, 1, torch.float16)
        assert_within_contract(spec.bwd(dy, y, 1, torch.float16), expected)

    assert _in_a_child(run) == 0


@pytest.mark.parametrize("variant", LAYER_NORM_CONFIGS)
@pytest.mark.parametrize("N", [197, 200, 255])
def test_layer_norm_touches_nothing_outside_its_tensors(
    force: Any, monkeypatch: pytest.MonkeyPatch, variant: str, N: int
) -> None:
    from fused_ops.kernels.norm import layer_norm, layer_norm_bwd

    force(layer_norm, "layer_norm_fwd_config", LAYER_NORM_CONFIGS[variant])
    force(layer_norm_bwd, "layer_norm_bwd_config", LAYER_NORM_CONFIGS[variant])
    spec = REGISTRY["layer_norm"]
    kept: list[mmap.mmap] = []

    def guarded(values: Tensor) -> Tensor:
        tensor, memory = _at_the_end_of_a_page(values)
        kept.append(memory)
        return tensor

    def launch(kernel: Any, grid: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        copies = [guarded(a) if isinstance(a, Tensor) and a.numel() else a for a in args]
        kernel[(grid,)](*copies, **kwargs)
        for a, copy in zip(args, copies):
            if isinstance(a, Tensor) and a.numel():
                a.copy_(copy)
        return True

    watch_launches(launch)

    def run() -> None:
        x, dy = torch.randn(2, 13, N).half()
        w, b = torch.randn(2, N).half()
        outputs = spec.launch(x, w, b, 1e-5)
        for out, expected in zip(outputs, spec.bound(x, w, b, 1e-5)):
            assert_within_contract(out, expected)
        args = (dy, x, w, *outputs[1:], True, True, True, torch.float16)
        for out, expected in zip(spec.raw[1].launch(*args), spec.raw[1].bound(*args)):
            assert_within_contract(out, expected)

    assert _in_a_child(run) == 0


def test_the_guard_page_catches_a_read_past_the_end() -> None:
    x, _kept = _at_the_end_of_a_page(torch.zeros(10))
    assert _in_a_child(lambda: ctypes.string_at(x.data_ptr(), 41)) != 0
    assert _in_a_child(lambda: ctypes.string_at(x.data_ptr(), 40)) == 0
