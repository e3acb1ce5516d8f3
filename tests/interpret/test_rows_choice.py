"""Which variant of the row kernels runs, how rows fall into tiles, and that tuning measures what it forces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops._runtime import clusters, settings, tables
from fused_ops._tools import tune_measure
from fused_ops.kernels import rows
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import KERNELS, ContractMode, forget_plans, recorded, watch_launches
from tests.interpret.row_variants import INF, launches


@pytest.mark.parametrize(
    ("wanted", "triton", "kernels", "ctas"),
    [
        (True, (3, 8), ["softmax_fwd_cluster_kernel", "softmax_bwd_packed_kernel"], [8, 8]),
        (False, (3, 8), ["softmax_fwd_chunked_kernel", "softmax_bwd_chunked_kernel"], [1, 1]),
        (True, (3, 7), ["softmax_fwd_chunked_kernel", "softmax_bwd_chunked_kernel"], [1, 1]),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_clusters_are_chosen_by_request_where_they_can_run(
    monkeypatch: pytest.MonkeyPatch, wanted: bool, triton: tuple[int, int], kernels: list[str], ctas: list[int]
) -> None:
    launched = launches(monkeypatch)
    monkeypatch.setattr(settings, "CLUSTER", wanted)
    monkeypatch.setattr(clusters, "_triton", lambda: triton)
    forget_plans()
    x = torch.randn(2, 128256)
    x[0, 16032:] = -INF  # all parts but the first
    spec = REGISTRY["softmax"]
    with ContractMode():
        y = spec.fwd(x, 1, None).to(torch.bfloat16)
        spec.bwd(torch.randn(2, 128256).to(torch.bfloat16), y, 1, torch.bfloat16)
    assert list(dict.fromkeys(launched)) == list(zip(kernels, ctas))
    forget_plans()


@pytest.mark.parametrize(
    ("N", "wanted", "kernel"), [(32776, True, "cluster"), (32776, False, "chunked"), (32777, True, "chunked")]
)
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_norm_clusters_are_chosen_by_request(monkeypatch: pytest.MonkeyPatch, N: int, wanted: bool, kernel: str) -> None:
    launched = launches(monkeypatch)
    monkeypatch.setattr(settings, "CLUSTER", wanted)
    monkeypatch.setattr(clusters, "_triton", lambda: (3, 8))
    forget_plans()
    w, b = torch.randn(2, N)
    with ContractMode():
        REGISTRY["layer_norm"].fwd(torch.randn(2, N) + 5, w, b, 1e-5)
    assert set(launched) == {(f"layer_norm_fwd_{kernel}_kernel", 8 if kernel == "cluster" else 1)}
    forget_plans()


@pytest.mark.parametrize(
    ("M", "block_m", "step"), [(1, 1, 1), (9, 4, 1), (9, 4, 8), (64, 4, 8), (75, 4, 8), (13, 1, 8), (0, 4, 8)]
)
def test_tiles_hold_each_row_once(M: int, block_m: int, step: int) -> None:
    tiles = [
        [t // step * step * block_m + t % step + step * i for i in range(block_m)]
        for t in range(rows.row_tiles(M, block_m, step))
    ]
    assert sorted(row for tile in tiles for row in tile if row < M) == list(range(M))
    assert all(tile[0] < M for tile in tiles)


def test_alignment_of_rows() -> None:
    assert rows.row_vectors(256, 2, 1, (256, 256)) == (8, False, True)
    assert rows.row_vectors(200, 2, 1, (200, 200)) == (8, False, True)
    assert rows.row_vectors(197, 2, 1, (197, 197)) == (8, True, True)
    assert rows.row_vectors(197, 2, 1, (200, 197)) == (8, True, False)
    assert rows.row_vectors(200, 2, 2, (400, 200)) == (1, False, False)
    assert rows.row_vectors(7, 2, 1, (7, 7)) == (1, False, False)
    assert rows.row_vectors(513, 4, 1, (513, 513)) == (4, True, True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.usefixtures("poisoned_memory")
def test_tuning_measures_what_it_forces_and_refuses_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, kernel: str, itemsize: int
) -> None:
    key = tables.Key(kernel, 4, 2056, itemsize)
    config = RowConfig(1, 4096, 8)
    other = RowConfig(1, 1024, 8, "chunked")
    cluster = RowConfig(1, 4096, 8, num_ctas=4)
    launched: list[dict[str, Any]] = []

    def spy(_kernel: Any, _grid: int, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        launched.append(kwargs)
        return False

    watch_launches(spy)
    for wanted in (config, other, cluster) if KERNELS[kernel].clustered else (config, other):
        launched.clear()
        assert tune_measure.measure(key, wanted, "cpu", lambda call: (call(), 0.002)[1]) == 2.0
        seen = {(k["BLOCK_N"], k["num_warps"], k.get("num_ctas", 1)) for k in launched if "VEC" in k}
        assert seen == {(wanted.block_n, 8, wanted.num_ctas)}
    watch_launches(lambda *_: True)  # outputs stay as they were
    with pytest.raises(AssertionError, match=kernel):
        tune_measure.measure(key, config, "cpu", lambda call: 0.0)
    assert not tables._forced


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", range(5))
def test_rows_are_read_in_pairs_only_where_they_begin_at_pairs(dtype: torch.dtype, offset: int) -> None:
    """A view that begins at an odd element, after an aligned tensor of the same sizes and strides: no plan of the other's."""
    N, spec = 32768, REGISTRY["softmax"]
    aligned = torch.randn(2, N).to(dtype)
    view = torch.randn(2 * N + offset).to(dtype)[offset:].view(2, N)
    for args, backward in (
        ((aligned, 1, None), False), ((view, 1, None), False),
        ((aligned, aligned, 1, dtype), True), ((view, aligned, 1, dtype), True), ((aligned, view, 1, dtype), True),
    ):  # fmt: skip
        with recorded() as made:
            spec.raw[backward].launch(*args)
        ((kernel, _, _),) = made
        in_pairs = offset % 2 == 0 or all(a is not view for a in args)
        assert ("packed" in kernel.__name__) is in_pairs, (offset, kernel.__name__)
