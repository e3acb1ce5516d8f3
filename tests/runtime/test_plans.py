"""What is planned for a launch: no program more than there is work for, and one plan for one set of dtypes."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops._runtime import device as device_module
from fused_ops._runtime import launch as launch_module
from fused_ops._runtime import tables
from fused_ops._runtime.compiled import Planned
from fused_ops.kernels.config import MatmulConfig, RowConfig
from fused_ops.kernels.rows import row_tiles
from fused_ops.ops.linear import matmul_plan
from fused_ops.ops.linear.matmul_plan import FP8_CHUNK, forced_config
from fused_ops.testing import Op, Raw, forget_plans, watch_launches
from tests.contract import leaves

DTYPES = (torch.float32, torch.bfloat16)
Launched = tuple[Any, int, tuple[Any, ...], dict[str, Any]]  # (kernel, grid, arguments, options)


class Launchers(TorchDispatchMode):
    """The raw operators go to their kernels' launchers, as on a GPU; calls: what each was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.raws = {raw.overload: raw for op in REGISTRY.values() for raw in op.raw}
        self.calls: list[tuple[Raw, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.raws:
            return func(*args, **(kwargs or {}))
        self.calls.append((self.raws[func], args))
        return self.raws[func].launch(*args)


@pytest.fixture
def made() -> Iterator[list[Launched]]:
    """The launches from here on, none of which is made."""
    forget_plans()
    found: list[Launched] = []

    def watch(*launched: Any) -> bool:
        found.append(launched)
        return True

    before = watch_launches(watch)
    yield found
    watch_launches(before)
    forget_plans()


def _run(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Raw, tuple[Any, ...]]]:
    """Call an op and, where it has one, its backward; what the raw operators were given."""
    given, wanted = leaves(args) if op.trains else (list(args), [])
    with Launchers() as mode:
        out = op.public(*given, **kwargs)
        if wanted:
            out.backward(torch.zeros_like(out))
    return mode.calls


def _calls(op: Op) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every sample, and each benchmark shape's call with few rows: as many as tiles hold, one more and one less."""
    for dtype in DTYPES:
        for sample in op.samples("cpu", dtype):
            if "slow" not in sample.tags:
                yield sample.args, sample.kwargs
        for M, N in itertools.product((63, 64, 65, 1024), (64, 136, 2048)):
            shape = (M, *[N] * (len(next(iter(op.bench.shapes.values()))) - 1))
            if M * N <= 1 << 16 or M == 64:
                yield op.bench.make("cpu", shape, dtype, (*op.bench.variants, None)[0])


def test_a_measured_configuration_serves_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first GPU is number 0, and the interpreter -1."""
    config = RowConfig(1, 1024, 4)
    for index in (-1, 0, 1):
        monkeypatch.setitem(tables._tables, index, {tables.Key("softmax_fwd", 4096, 1000, 2): config})
        found = tables.measured("softmax_fwd", 4000, 1000, 2, index)
        assert found == (config if index >= 0 else None)
        assert tables.measured("softmax_fwd", 2048, 1000, 2, index) is None


def programs(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> set[int]:
    """How many programs a launch may have: by the tiles of what it computes, and no more than there are SMs for."""

    def tiles(size: int, name: str) -> int:
        return -(-size // options[f"BLOCK_{name}"])

    name, sms = kernel.__name__, device_module.INTERPRETER_SMS
    sizes = [a for a in args if not isinstance(a, Tensor)]
    N = options.get("N", sizes[1] if len(sizes) > 1 else None)
    M = sizes[0] if sizes else args[0].numel() // N
    if name == "column_sum_kernel":
        return {tiles(N, "N"), 2 * tiles(N, "N")}
    if "_inner_" in name:
        return {args[0].numel() // (N * options["K"]) * tiles(options["K"], "K")}
    if "BLOCK" in options:  # elements rather than rows
        return {-(-M * N // options["BLOCK"])}
    if len(sizes) > 2:  # (M, N, ..., rows of a program)
        return {-(-M // sizes[-1]) * tiles(N, "N")}
    if "BLOCK_K" in options:
        one = tiles(M, "M") * tiles(N, "N")
        per_split = options.get("k_per_split")
        if per_split:
            return {one * -(-options["K"] // per_split)}
        return {min(one, sms * each) for each in (1, 2)} if "_tma_" in name else {one}
    if "BLOCK_M" not in options:
        return {M}
    if "_norm_bwd_" in name:  # so many partial rows
        return {min(tiles(M, "M"), sms * each) for each in (1, 2, 3, 4)}
    step = options["VEC"] if options.get("EDGES") and "_norm_" in name else 1
    return {row_tiles(M, options["BLOCK_M"], step)}


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_no_program_is_idle_and_none_is_missing(op: Op, made: list[Launched]) -> None:
    for args, kwargs in _calls(op):
        _run(op, args, kwargs)
    assert len({(kernel.__name__, grid) for kernel, grid, _, _ in made}) > 5
    for kernel, grid, args, options in made:
        assert grid in programs(kernel, args, options), (kernel.__name__, grid, args[0].shape, options)


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_a_plan_serves_one_set_of_dtypes(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm launch asks for no dtype: the kernel that a plan keeps was compiled for its own."""
    forget_plans()
    served: dict[int, set[Any]] = defaultdict(set)
    kept: list[Planned] = []

    def note(planned: Planned, grid: int, sizes: Any, tensors: tuple[Tensor, ...]) -> None:
        kept.append(planned)  # so that its id is its own
        served[id(planned)].add((planned.device, *(t.dtype for t in tensors)))

    monkeypatch.setattr(launch_module, "_launch_otherwise", note)
    for dtype in DTYPES:
        sample = op.example("cpu", dtype)
        for i, other in itertools.product(range(len(sample.args)), (torch.float32, torch.bfloat16, torch.float16)):
            given = sample.args[i]
            changed = given.to(other) if isinstance(given, Tensor) and given.dtype.itemsize > 1 else given
            with contextlib.suppress(RuntimeError):  # a mix that the function refuses
                _run(op, (*sample.args[:i], changed, *sample.args[i + 1 :]), sample.kwargs)
    forget_plans()
    assert len(served) > 1
    assert [dtypes for dtypes in served.values() if len(dtypes) > 1] == []


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_what_kernels_take_goes_to_kernels(op: Op, made: list[Launched]) -> None:
    """Where a launcher called ATen instead, results would be right all the same."""
    for dtype in (*DTYPES, torch.float16):
        for sample in op.samples("cpu", dtype):
            tensors = [a for a in sample.args if isinstance(a, Tensor)]
            if all(t.numel() and t.dim() for t in tensors) and "slow" not in sample.tags:
                for raw, args in _run(op, sample.args, sample.kwargs):
                    made.clear()
                    raw.launch(*args)
                    assert made, (raw.name, sample.name, dtype)


def test_a_plan_is_launched_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on that device's current stream, whichever device is current."""
    current, ran = [1], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch_module, "_current_device", lambda: current[-1])
    monkeypatch.setattr(launch_module, "_current_stream", lambda index: 100 + index)
    monkeypatch.setattr(Planned, "run", lambda self, stream, *_: ran.append((self.device, current[-1], stream)))
    for index in (0, 1):
        launch_module.launch(Planned(index, None, {}), 3, torch.empty(1))
        launch_module.launch_grid(Planned(index, None, {}), 3, (), torch.empty(1))
    assert ran == [(index, index, 100 + index) for index in (0, 0, 1, 1)]
    assert current == [1]


def test_a_forced_configuration_counts_from_its_first_call_to_its_last(made: list[Launched]) -> None:
    """Also where the same call was planned before it, or within."""
    x, w = torch.randn(72, 40).half(), torch.randn(24, 40).half()

    def kernel() -> str:
        made.clear()
        REGISTRY["linear"].launch(x, w, None, "relu", False)
        return made[0][0].__name__

    chosen = kernel()
    with forced_config(MatmulConfig(16, 32, 16, num_warps=4, num_stages=2, kind="split_k", splits=2)):
        assert kernel() == "linear_split_k_kernel" != chosen
    assert kernel() == chosen


STAGES = [  # (Triton, capability, rows of a tile, kind, stages of the three that a configuration asks for)
    ((3, 6), (9, 0), 64, "pointer", 1),
    ((3, 6), (9, 0), 64, "split_k", 1),
    ((3, 7), (9, 0), 64, "pointer", 3),
    ((3, 6), (8, 0), 64, "pointer", 3),
    ((3, 6), (9, 0), 32, "pointer", 3),  # mma.sync, which is in the generic proxy
    ((3, 6), (9, 0), 64, "tma", 3),
]


@pytest.mark.parametrize(
    ("triton", "capability", "block_m", "kind", "stages", "dtype"),
    [
        (*row, dtype)
        for row in STAGES
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        if dtype is not torch.float32 or "tma" not in row  # no TMA kernel takes fp32
    ],
)
def test_products_of_copied_tiles_take_one_stage_where_triton_leaves_out_their_fence(
    triton: tuple[int, int], capability: tuple[int, int], block_m: int, kind: str, stages: int,
    dtype: torch.dtype, made: list[Launched], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(matmul_plan, "triton_version", lambda: (f"{triton}", triton))
    monkeypatch.setattr(device_module, "INTERPRETER_CAPABILITY", capability)
    x, w = torch.randn(72, 64, dtype=dtype), torch.randn(72, 64, dtype=dtype)
    config = MatmulConfig(block_m, 32, 32, num_warps=4, num_stages=3, kind=kind, splits=2 if kind == "split_k" else 1)
    for tf32 in (False, True) if dtype is torch.float32 else (False,):
        monkeypatch.setattr(matmul_plan, "precision_of", lambda *_, tf32=tf32: "tf32" if tf32 else "ieee")
        made.clear()
        with forced_config(config):
            REGISTRY["linear"].launch(x, w, None, "relu", False)
        by_fma = dtype is torch.float32 and not tf32
        assert made[0][3]["num_stages"] == (3 if by_fma else stages)


def test_fp8_sums_of_hopper_join_an_fp32_sum(made: list[Launched]) -> None:
    """Its tensor cores add fp8 products in fewer bits than fp32's."""
    op = REGISTRY["linear_fp8"]
    for args, kwargs in _calls(op):
        _run(op, args, kwargs)
    products = [options for _, _, _, options in made if "IMPRECISE" in options]
    assert products
    assert all(options["IMPRECISE"] == min(FP8_CHUNK, options["BLOCK_K"]) for options in products)
