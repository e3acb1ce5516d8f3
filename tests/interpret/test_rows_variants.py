"""Every variant of the row kernels, forced by its configuration at sizes where the chooser would not take it."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY, fused_layernorm
from fused_ops._runtime import clusters, settings, tables
from fused_ops._runtime import launch as launch_module
from fused_ops._runtime.plans import forget_plans
from fused_ops._tools import tune_measure
from fused_ops.kernels import rows
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import ContractMode, assert_within_contract

INF, NAN = float("inf"), float("nan")
HALF = (torch.float16, torch.bfloat16)
SOFTMAX_CONFIGS = {
    "tile": RowConfig(4, 256, 4),
    "row": RowConfig(1, 256, 1),
    "packed": RowConfig(1, 256, 4, "packed"),
    "chunked": RowConfig(1, 64, 2, "chunked"),
    "cluster": RowConfig(1, 256, 2, num_ctas=4),
    "packed_cluster": RowConfig(1, 256, 2, "packed", num_ctas=4),
}
SUFFIXES = {"packed": "_packed", "packed_cluster": "_packed", "chunked": "_chunked", "cluster": "_cluster"}


def _launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The launches from here on, as (kernel, programs a cluster); they are made."""
    launched: list[tuple[str, int]] = []

    def spy(kernel: Any, _grid: int, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        launched.append((kernel.__name__, kwargs.get("num_ctas", 1)))
        return False

    monkeypatch.setattr(launch_module, "_recorder", spy)
    return launched


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str, RowConfig], list[str]]]:
    """force(module, chooser, config): the chooser answers config; returns the names of the kernels launched from then on."""
    launched: list[str] = []
    ctas = {1}

    def spy(kernel: Any, _grid: int, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if "column_sum" not in kernel.__name__:
            launched.append(kernel.__name__)
            assert kwargs.get("num_ctas", 1) in ctas
        return False

    def force(module: Any, chooser: str, config: RowConfig) -> list[str]:
        forget_plans()
        ctas.clear()
        ctas.add(config.num_ctas)
        monkeypatch.setattr(module, chooser, lambda *_: config)
        monkeypatch.setattr(launch_module, "_recorder", spy)
        return launched

    yield force
    forget_plans()


def _layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """(M, N) matrices whose rows start at 16 bytes, anywhere, or anywhere with a stride of their own."""
    generator = torch.Generator().manual_seed(1)

    def r(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 3).to(dtype)

    special = r(9, 201)
    for i, value in enumerate((-INF, INF, NAN)):
        special[i, 0] = special[3 + i, 200] = special[6 + i, 100] = value  # head, tail and aligned part
    special[7] = -INF
    special[8, :100] = -INF
    return {
        "aligned": r(5, 256),
        "odd": r(9, 197),
        "even": r(9, 198),
        "groups_of_8": r(5, 200),
        "short_odd": r(9, 65),
        "odd_stride": r(9, 205)[:, :101],
        "other_stride": r(9, 208)[:, :101],
        "column_stride": r(5, 400)[:, ::2],
        "offset": r(2000)[3 : 3 + 9 * 199].view(9, 199),
        "special": special,
    }


LAYOUTS = list(_layouts(torch.float32))
UNPACKABLE = ("other_stride", "column_stride")  # the launcher never asks for the packed kernels here
SOFTMAX_CASES = [
    (variant, layout, dtype)
    for variant in SOFTMAX_CONFIGS
    for layout in LAYOUTS
    for dtype in (HALF if variant.startswith("packed") else (torch.float32, torch.bfloat16))
    if not variant.startswith("packed") or layout not in UNPACKABLE
]


@pytest.mark.parametrize(("variant", "layout", "dtype"), SOFTMAX_CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_softmax_forward(force: Any, variant: str, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.softmax import softmax

    x = _layouts(dtype)[layout]
    launched = force(softmax, "softmax_fwd_config", SOFTMAX_CONFIGS[variant])
    with ContractMode():
        REGISTRY["softmax"].fwd(x, 1, None)
    assert set(launched) == {f"softmax_fwd{SUFFIXES.get(variant, '')}_kernel"}


@pytest.mark.parametrize(("variant", "layout", "dtype"), SOFTMAX_CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_softmax_backward(force: Any, variant: str, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.softmax import softmax

    dy = _layouts(dtype)[layout]
    if layout == "special":
        dy = dy.nan_to_num(0.5, 2.0, -2.0)
    y = torch.softmax(dy.flip(0).float(), -1).to(dtype)
    launched = force(softmax, "softmax_bwd_config", SOFTMAX_CONFIGS[variant])
    with ContractMode():
        REGISTRY["softmax"].bwd(dy, y, 1, dtype)
    assert set(launched) == {f"softmax_bwd{SUFFIXES.get(variant, '')}_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_to_another_dtype(force: Any, dtype: torch.dtype) -> None:
    from fused_ops.kernels.softmax import softmax

    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    for variant in ("tile", "chunked", "cluster"):
        force(softmax, "softmax_fwd_config", SOFTMAX_CONFIGS[variant])
        with ContractMode():
            REGISTRY["softmax"].fwd(_layouts(dtype)["odd"], 1, other)


LAYER_NORM_CONFIGS = {
    "tile": RowConfig(4, 256, 4),
    "row": RowConfig(1, 256, 1),
    "chunked": RowConfig(1, 64, 2, "chunked"),
    "chunked_tile": RowConfig(4, 64, 2, "chunked"),
}
LAYER_NORM_CASES = [
    (variant, layout, dtype)
    for variant in LAYER_NORM_CONFIGS
    for layout in LAYOUTS
    for dtype in (torch.float32, torch.float16)
    if layout != "special" and (dtype is torch.float32 or layout in ("odd", "groups_of_8"))
]


@pytest.mark.parametrize(("variant", "layout", "dtype"), LAYER_NORM_CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_norm(force: Any, variant: str, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.norm import layer_norm, layer_norm_bwd

    config = LAYER_NORM_CONFIGS[variant]
    x = _layouts(dtype)[layout] + 3
    w, b = torch.randn(2, x.shape[1]).to(dtype)
    suffix = "_chunked" if config.chunked else ""
    launched = force(layer_norm, "layer_norm_fwd_config", config)
    force(layer_norm_bwd, "layer_norm_bwd_config", config)
    spec = REGISTRY["layer_norm"]
    with ContractMode():
        _, mean, rstd = spec.fwd(x, w, b, 1e-5)
        assert set(launched) == {f"layer_norm_fwd{suffix}_kernel"}
        dy = _layouts(dtype)["odd" if layout == "aligned" else layout][:, : x.shape[1]]
        if dy.shape != x.shape:
            dy = torch.randn(x.shape[::-1]).to(dtype).t()
        launched.clear()
        spec.bwd(dy, x, w, mean, rstd, True, True, True, dtype)
    assert set(launched) == {f"layer_norm_bwd{suffix}_kernel"}


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_norm_clusters(force: Any, layout: str, dtype: torch.dtype) -> None:
    from fused_ops.kernels.norm import layer_norm

    x = _layouts(dtype)[layout] + 3
    w, b = torch.randn(2, x.shape[1]).to(dtype)
    launched = force(layer_norm, "layer_norm_fwd_config", RowConfig(1, 256, 2, num_ctas=4))
    spec = REGISTRY["layer_norm"]
    with ContractMode():
        for weight, bias in ((w, b), (None, b), (w.float(), None)):
            spec.fwd(x, weight, bias, 1e-5)
        expected = torch.nn.functional.layer_norm(x.float(), x.shape[1:], w.float(), b.float())
        torch.testing.assert_close(fused_layernorm(x, x.shape[1:], w, b).float(), expected, rtol=2e-3, atol=2e-3)
    assert set(launched) == {"layer_norm_fwd_cluster_kernel"}


@pytest.mark.parametrize("variant", ["tile", "row", "chunked"])
@pytest.mark.parametrize("N", [67, 68])
@pytest.mark.parametrize("M", [1, 7, 8, 75])
@pytest.mark.usefixtures("poisoned_memory")
def test_layer_norm_of_rows_that_start_anywhere(force: Any, variant: str, N: int, M: int) -> None:
    from fused_ops.kernels.norm import layer_norm

    force(layer_norm, "layer_norm_fwd_config", LAYER_NORM_CONFIGS[variant])
    x = (torch.randn(M, N) + 100).half()
    w, b = torch.randn(2, N)
    with ContractMode():
        first = REGISTRY["layer_norm"].fwd(x, w, b, 1e-5)
    for out, again in zip(first, REGISTRY["layer_norm"].fwd(x, w, b, 1e-5)):
        assert torch.equal(out, again)


@pytest.mark.parametrize("variant", LAYER_NORM_CONFIGS)
@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_layer_norm_backward_of_what_is_needed(force: Any, variant: str, needs: tuple[int, int, int]) -> None:
    from fused_ops.kernels.norm import layer_norm_bwd

    force(layer_norm_bwd, "layer_norm_bwd_config", LAYER_NORM_CONFIGS[variant])
    x, dy = torch.randn(2, 21, 130)
    w = torch.randn(130, dtype=torch.bfloat16)
    spec = REGISTRY["layer_norm"]
    _, mean, rstd = spec.fwd(x, w, None, 1e-5)
    with ContractMode():
        spec.bwd(dy, x, w, mean, rstd, *map(bool, needs), torch.float16)


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
    launched = _launches(monkeypatch)
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
    launched = _launches(monkeypatch)
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
        (expected,) = spec.backward.bound(dy, y, 1, torch.float16)
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

    monkeypatch.setattr(launch_module, "_recorder", launch)

    def run() -> None:
        x, dy = torch.randn(2, 13, N).half()
        w, b = torch.randn(2, N).half()
        outputs = spec.launch(x, w, b, 1e-5)
        for out, expected in zip(outputs, spec.bound(x, w, b, 1e-5)):
            assert_within_contract(out, expected)
        args = (dy, x, w, *outputs[1:], True, True, True, torch.float16)
        for out, expected in zip(spec.backward.launch(*args), spec.backward.bound(*args)):
            assert_within_contract(out, expected)

    assert _in_a_child(run) == 0


def test_the_guard_page_catches_a_read_past_the_end() -> None:
    x, _kept = _at_the_end_of_a_page(torch.zeros(10))
    assert _in_a_child(lambda: ctypes.string_at(x.data_ptr(), 41)) != 0
    assert _in_a_child(lambda: ctypes.string_at(x.data_ptr(), 40)) == 0


@pytest.mark.parametrize("kernel", tables.KERNELS)
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

    monkeypatch.setattr(launch_module, "_recorder", spy)
    for wanted in (config, other, cluster) if kernel in clusters.CLUSTERED else (config, other):
        launched.clear()
        assert tune_measure.measure(key, wanted, "cpu", lambda call: (call(), 0.002)[1]) == 2.0
        seen = {(k["BLOCK_N"], k["num_warps"], k.get("num_ctas", 1)) for k in launched if "VEC" in k}
        assert seen == {(wanted.block_n, 8, wanted.num_ctas)}
    monkeypatch.setattr(launch_module, "_recorder", lambda *_: True)  # outputs stay as they were
    with pytest.raises(AssertionError, match=kernel):
        tune_measure.measure(key, config, "cpu", lambda call: 0.0)
    assert not tables._forced
