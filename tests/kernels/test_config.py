"""Configurations are pure functions that give a launchable configuration for every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_ops._runtime.tables import Key, check_config
from fused_ops.kernels.config import CLUSTER_TRITON, L2_BYTES, L2_SHARE, cdiv, chunked_programs, has_clusters, next_power_of_2
from fused_ops.kernels.norm import layer_norm, layer_norm_bwd, layer_norm_cluster, norm_bwd_wide, rms_norm
from fused_ops.kernels.reduce import column_sum_blocks
from fused_ops.kernels.softmax import softmax, softmax_inner
from fused_ops.testing import KERNELS

CHOOSERS: dict[str, Callable[..., Any]] = {
    "softmax_fwd": softmax.softmax_fwd_config,
    "softmax_bwd": softmax.softmax_bwd_config,
    "layer_norm_fwd": layer_norm.layer_norm_fwd_config,
    "layer_norm_bwd": layer_norm_bwd.layer_norm_bwd_config,
    "rms_norm_fwd": rms_norm.rms_norm_fwd_config,
    "rms_norm_bwd": rms_norm.rms_norm_bwd_config,
}
SIZES = st.tuples(
    st.integers(1, 1 << 30), st.integers(1, 1 << 19), st.sampled_from([2, 4]),
    st.sampled_from([(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]), st.sampled_from([1, 20, 132, 148]),
)  # fmt: skip


def test_every_tuned_kernel_is_here() -> None:
    assert set(CHOOSERS) == set(KERNELS)


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


@pytest.mark.parametrize("kernel", ["softmax_fwd", "softmax_bwd"])
@given(sizes=SIZES, packable=st.booleans())
def test_a_cluster_takes_only_rows_that_no_program_holds(kernel: str, sizes: tuple[Any, ...], packable: bool) -> None:
    M, N, itemsize, *_ = sizes
    alone = CHOOSERS[kernel](*sizes, packable)
    config = CHOOSERS[kernel](*sizes, packable, True)
    assert alone.num_ctas == 1
    assert alone == config or (alone.chunked and config.num_ctas > 1)
    check_config(Key(kernel, next_power_of_2(M), N, itemsize), config, clusters=True)
    if config.num_ctas > 1:
        assert config.variant == ("packed" if packable and itemsize == 2 else "one_pass")
        with pytest.raises(ValueError, match=r"num_ctas: got 8, allowed: 1.*3\.8"):
            check_config(Key(kernel, next_power_of_2(M), N, itemsize), config)


@pytest.mark.parametrize(
    ("kernel", "itemsize", "longest"),
    [("softmax_fwd", 2, 524288), ("softmax_fwd", 4, 262144), ("softmax_bwd", 2, 262144), ("softmax_bwd", 4, 131072)],
)
def test_the_longest_row_of_a_cluster(kernel: str, itemsize: int, longest: int) -> None:
    for N in (128256, longest):
        assert CHOOSERS[kernel](64, N, itemsize, (9, 0), 132, True, True).num_ctas == 8
    assert CHOOSERS[kernel](64, longest + 1, itemsize, (9, 0), 132, True, True).chunked


@given(N=st.integers(1, 1 << 20), itemsize=st.sampled_from([2, 4]))
def test_layer_norm_clusters(N: int, itemsize: int) -> None:
    alone = layer_norm.layer_norm_fwd_config(64, N, itemsize, (9, 0), 132)
    config = layer_norm_cluster.layer_norm_fwd_cluster_config(alone, N)
    assert (config.num_ctas == 8) == (32768 < N <= 262144)
    assert config.num_ctas == 8 or config == alone
    check_config(Key("layer_norm_fwd", 64, N, itemsize), config, clusters=True)


@pytest.mark.parametrize(
    ("capability", "triton", "can"),
    [
        ((9, 0), (3, 8), True), ((10, 0), (3, 9), True), ((10, 3), (4, 0), True), ((9, 0), (3, 10), True),
        ((9, 0), (3, 7), False), ((9, 0), (2, 9), False), ((8, 9), (3, 9), False), ((12, 0), (3, 9), False),
    ],
)  # fmt: skip
def test_where_clusters_are(capability: tuple[int, int], triton: tuple[int, int], can: bool) -> None:
    assert has_clusters(capability, triton) == can
    assert CLUSTER_TRITON == (3, 8)


@given(M=st.integers(1, 1 << 30), N=st.integers(1, 1 << 19), sms=st.sampled_from([1, 20, 132]))
def test_partial_rows_are_bounded_by_the_chip(M: int, N: int, sms: int) -> None:
    config = layer_norm_bwd.layer_norm_bwd_config(M, N, 2, (9, 0), sms)
    programs = layer_norm_bwd.layer_norm_bwd_programs(M, config, sms)
    assert 1 <= programs <= min(4 * sms, cdiv(M, config.block_m))


@given(
    M=st.integers(1, 1 << 30), N=st.integers(8193, 1 << 19), itemsize=st.sampled_from([2, 4]), sms=st.sampled_from([1, 20, 132])
)
def test_groups_of_rows_fill_the_chip_once(M: int, N: int, itemsize: int, sms: int) -> None:
    """The chunked backward of a norm: its programs are on the chip at once, and each group has a tile of rows."""
    for whole in (False, True):
        config = norm_bwd_wide.wide_config(itemsize, whole)
        groups, strips = norm_bwd_wide.row_groups(M, N, config, sms), cdiv(N, config.block_n)
        assert 1 <= groups <= cdiv(M, config.block_m)
        assert groups == 1 or groups * strips <= 4 * sms
        assert config.block_n * itemsize == 16 * 32 * config.num_warps  # a column has one thread


@given(
    N=st.integers(1, 1 << 20),
    itemsize=st.sampled_from([2, 4]),
    sms=st.integers(1, 200),
    capability=st.sampled_from([*L2_BYTES]),
)
def test_rows_that_are_read_twice_stay_in_l2(N: int, itemsize: int, sms: int, capability: tuple[int, int]) -> None:
    row, room = N * itemsize, L2_SHARE * L2_BYTES[capability]
    programs = chunked_programs(capability, sms, row)
    if programs:
        assert programs * row <= room
        assert 5 * sms <= 8 * programs <= 16 * sms
        assert programs <= sms or programs == 2 * sms
    else:  # four programs an SM fit, or too few SMs would be at work
        assert 4 * sms * row <= room or (room // row) * 8 < 5 * sms


@pytest.mark.parametrize(
    ("capability", "sms", "row_bytes", "programs"),
    [
        ((9, 0), 132, 2 * 131073, 114), ((9, 0), 132, 4 * 50257, 132), ((9, 0), 132, 4 * 32768, 132), ((9, 0), 132, 2 * 50257, 264),
        ((9, 0), 132, 2 * 256000, 0), ((9, 0), 132, 16384, 0), ((8, 0), 108, 2 * 65536, 0), ((10, 0), 148, 2 * 131072, 148),
        ((7, 5), 40, 2 * 131072, 0),
    ],
)  # fmt: skip
def test_programs_of_rows_read_twice(capability: tuple[int, int], sms: int, row_bytes: int, programs: int) -> None:
    assert chunked_programs(capability, sms, row_bytes) == programs


@given(P=st.integers(1, 1 << 20))
def test_tiles_of_partial_rows(P: int) -> None:
    block_p, block_n = column_sum_blocks(P)
    assert block_p * block_n <= 4096
    assert 16 <= block_n <= 64
    assert block_p >= min(P, 256)


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
