"""Configurations are pure functions that give a launchable configuration for every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_ops._tune import Key, check_config
from fused_ops.kernels import layer_norm, layer_norm_bwd, softmax, softmax_inner
from fused_ops.kernels.config import cdiv, next_power_of_2

CHOOSERS: dict[str, Callable[..., Any]] = {
    "softmax_fwd": softmax.softmax_fwd_config,
    "softmax_bwd": softmax.softmax_bwd_config,
    "layer_norm_fwd": layer_norm.layer_norm_fwd_config,
    "layer_norm_bwd": layer_norm_bwd.layer_norm_bwd_config,
}
SIZES = st.tuples(
    st.integers(1, 1 << 30), st.integers(1, 1 << 19), st.sampled_from([2, 4]),
    st.sampled_from([(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]), st.sampled_from([1, 20, 132, 148]),
)  # fmt: skip


@pytest.mark.parametrize("kernel", CHOOSERS)
@given(sizes=SIZES)
def test_a_configuration_is_launchable(kernel: str, sizes: tuple[Any, ...]) -> None:
    M, N, itemsize, *_ = sizes
    config = CHOOSERS[kernel](*sizes)
    check_config(Key(kernel, next_power_of_2(M), N, itemsize), config)
    assert config == CHOOSERS[kernel](*sizes)
    assert cdiv(M, config.block_m) < 2**31


@pytest.mark.parametrize("kernel", ["softmax_fwd", "softmax_bwd"])
@given(sizes=SIZES)
def test_no_packed_kernel_where_it_cannot_run(kernel: str, sizes: tuple[Any, ...]) -> None:
    assert CHOOSERS[kernel](*sizes, False).variant != "packed"
    if sizes[2] == 4:
        assert CHOOSERS[kernel](*sizes, True).variant != "packed"


@given(M=st.integers(1, 1 << 30), N=st.integers(1, 1 << 19), sms=st.sampled_from([1, 20, 132]))
def test_partial_rows_are_bounded_by_the_chip(M: int, N: int, sms: int) -> None:
    config = layer_norm_bwd.layer_norm_bwd_config(M, N, 2, (9, 0), sms)
    programs = layer_norm_bwd.layer_norm_bwd_programs(M, config, sms)
    assert 1 <= programs <= min(4 * sms, cdiv(M, config.block_m))


@given(N=st.integers(1, 1 << 19), K=st.integers(1, 1 << 19))
def test_inner_softmax(N: int, K: int) -> None:
    config = softmax_inner.softmax_inner_config(N, K, 2, (9, 0), 132)
    assert config.chunked == (config.block_n < N)
    assert config.block_m * config.block_n <= 4096


@given(n=st.integers(0, 1 << 40))
def test_next_power_of_2(n: int) -> None:
    power = next_power_of_2(n)
    assert power & (power - 1) == 0
    assert power >= n
    assert power == 1 or power // 2 < n
