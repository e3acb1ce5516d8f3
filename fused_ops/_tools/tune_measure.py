"""What `fused-ops tune` runs on a GPU: one launcher with one configuration, checked against the contract, then timed."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._runtime import tables
from .._runtime.launch import recorded
from .._runtime.plans import forget_plans
from .._runtime.tuned_kernels import KERNELS
from .._torch.spec import REGISTRY
from ..kernels.config import RowConfig, next_power_of_2
from ..testing import assert_within_contract
from .launches import DEVICE
from .precompile import Call
from .tune import ContextLostError, candidates

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BY_ITEMSIZE = {2: torch.bfloat16, 4: torch.float32}
CHECKED_ROWS = 32  # a multiple of 16, as most numbers of rows: so the check compiles nothing of its own
CLOCKS_SECONDS = 0.02  # of work before a key is measured: an idle GPU's clocks are low

VALUABLE = (  # (op, M, N): the shapes whose configurations matter most, the first first
    ("softmax", 4096, 4096), ("layer_norm", 8192, 4096), ("layer_norm", 16384, 768), ("softmax", 262144, 512),
    ("softmax", 8192, 50257), ("layer_norm", 4096, 16384), ("softmax", 4096, 8192), ("softmax", 4096, 32768),
    ("layer_norm", 8192, 8192), ("layer_norm", 8192, 1024), ("softmax", 262144, 197), ("softmax", 8192, 65536),
    ("softmax", 4096, 128256), ("layer_norm", 2048, 32768), ("layer_norm", 2048, 65536), ("softmax", 256, 4096),
    ("layer_norm", 256, 4096),
)  # fmt: skip


def all_keys(itemsizes: Iterable[int] = tuple(BY_ITEMSIZE)) -> list[tables.Key]:
    """The keys of every benchmark shape for elements of so many bytes: those of VALUABLE first, in its order."""
    shapes: dict[str, set[tuple[int, int]]] = {kernel: set() for kernel in KERNELS}
    for op in ("softmax", "layer_norm"):
        for case in REGISTRY[op].bench.cases():
            M, N = case.shape
            for kernel in (f"{op}_fwd", f"{op}_bwd"):
                shapes[kernel].add((next_power_of_2(M), N))
    keys = [tables.Key(kernel, M, N, size) for size in itemsizes for kernel in shapes for M, N in sorted(shapes[kernel])]
    return sorted(keys, key=_value)


def _value(key: tables.Key) -> tuple[int, int, bool]:
    shape = (key.kernel[:-4], key.M, key.N)
    place = VALUABLE.index(shape) if shape in VALUABLE else len(VALUABLE)
    return list(BY_ITEMSIZE).index(key.itemsize), place, place < len(VALUABLE) and key.kernel.endswith("bwd")


def parse_dtypes(names: Sequence[str]) -> dict[int, torch.dtype]:
    """{bytes an element: dtype} of ["bf16,fp32"]. Raises ValueError on anything else, and on two dtypes of one size."""
    found: dict[int, torch.dtype] = {}
    for name in (part.strip() for said in names for part in said.split(",")):
        if name not in DTYPES:
            raise ValueError(f"got {name!r}, allowed: {', '.join(DTYPES)}, separated by commas")
        dtype = DTYPES[name]
        if found.setdefault(dtype.itemsize, dtype) is not dtype:
            raise ValueError("got bf16 and fp16, allowed: one of them, for they share the table's entries")
    return found


def name_of(key: tables.Key, dtypes: dict[int, torch.dtype]) -> str:
    """softmax_fwd-4096x1000-bf16: what `--keys` is matched against."""
    label = next(name for name, dtype in DTYPES.items() if dtype is dtypes[key.itemsize])
    return f"{key.kernel}-{key.M}x{key.N}-{label}"


def select(keys: list[tables.Key], dtypes: dict[int, torch.dtype], patterns: Sequence[str]) -> list[tables.Key]:
    """The keys that one of the patterns finds, in their order; all of them without a pattern.

    A pattern is a regular expression over `name_of`, or "headline", the keys of VALUABLE. Several may be separated by commas.
    Raises ValueError where one finds nothing.
    """
    found: set[tables.Key] = set()
    asked = [part.strip() for said in patterns for part in said.split(",")]
    for pattern in asked:
        try:
            search = re.compile(pattern).search
        except re.error as error:
            raise ValueError(f"got {pattern!r}, allowed: a regular expression ({error})") from None
        if pattern == "headline":
            matched = {key for key in keys if (key.kernel[:-4], key.M, key.N) in VALUABLE}
        else:
            matched = {key for key in keys if search(name_of(key, dtypes))}
        if not matched or not pattern:
            raise ValueError(
                f"got {pattern!r}, allowed: 'headline', or a pattern found in a name such as {name_of(keys[0], dtypes)}"
            )
        found |= matched
    return [key for key in keys if not asked or key in found]


def arguments(key: tables.Key, device: str, rows: int | None = None, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """The raw operator's arguments for key, or for fewer rows."""
    dtype = dtype or BY_ITEMSIZE[key.itemsize]
    shape = (key.M if rows is None else min(key.M, rows), key.N)
    x = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
    if key.kernel == "softmax_fwd":
        return x, 1, None
    if key.kernel == "softmax_bwd":
        return torch.randn(shape, device=device).to(dtype), torch.softmax(x, 1), 1, dtype
    w, b = torch.randn(2, key.N, device=device).to(dtype)
    if key.kernel == "layer_norm_fwd":
        return x, w.clone(), b.clone(), 1e-5
    variance, mean = torch.var_mean(x.float(), 1, correction=0)
    return x.flip(0), x, w.clone(), mean, torch.rsqrt(variance + 1e-5), True, True, True, dtype


def launcher(key: tables.Key) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(launcher, contract bound) of key's raw operator."""
    raw = next(raw for raw in REGISTRY[key.kernel[:-4]].raw if raw.name == key.kernel)
    return raw.launch, raw.bound


class Measure:
    """measure(key, config): microseconds of one call of key's launcher with config, its L2 cache cold.

    Raises AssertionError where the result breaks the contract, ContextLostError where the GPU answers no more.
    device: "cuda", or "cpu" for the interpreter. timer: milliseconds of a function's call.
    """

    def __init__(
        self, dtypes: dict[int, torch.dtype] | None = None, device: str = "cuda",
        timer: Callable[[Callable[[], Any]], float] | None = None,
    ) -> None:  # fmt: skip
        self.dtypes, self.device, self.timer = dtypes or BY_ITEMSIZE, device, timer or _milliseconds
        self._key: tables.Key | None = None
        self._few: tuple[Any, ...] = ()
        self._args: tuple[Any, ...] = ()
        self._expected: tuple[Any, ...] = ()
        self._checked: set[RowConfig] = set()

    def __call__(self, key: tables.Key, config: RowConfig) -> float:
        try:
            self._prepare(key)
            with forced(key.kernel, config):
                self._check(key, config)
                launch, _ = launcher(key)
                return self.timer(lambda: launch(*self._args)) * 1000.0
        except Exception as error:
            self._require_context(error)
            raise

    def heuristic(self, key: tables.Key) -> RowConfig:
        """The configuration that key's launcher chooses where there is no table."""
        try:
            self._prepare(key)
            return chosen(key, self._args)
        except Exception as error:
            self._require_context(error)
            raise

    def _prepare(self, key: tables.Key) -> None:
        if key == self._key:
            return
        self._key, self._few, self._args, self._checked = None, (), (), set()  # the last key's memory goes first
        dtype = self.dtypes[key.itemsize]
        launch, bound = launcher(key)
        self._few, self._args = arguments(key, self.device, CHECKED_ROWS, dtype), arguments(key, self.device, None, dtype)
        self._expected = bound(*self._few)
        self._key = key
        if self.device == "cuda":
            _raise_clocks(lambda: launch(*self._args))

    def _check(self, key: tables.Key, config: RowConfig) -> None:
        if config in self._checked:
            return
        outputs = launcher(key)[0](*self._few)
        for out, expected in zip(outputs if isinstance(outputs, tuple) else (outputs,), self._expected):
            if expected is not None:
                assert_within_contract(out, expected, f"{key.kernel} {config}")
        self._checked.add(config)

    def _require_context(self, error: Exception) -> None:
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as lost:  # torch.AcceleratorError, RuntimeError
                raise ContextLostError(str(lost).splitlines()[0] if str(lost) else type(lost).__name__) from error


def measure(
    key: tables.Key, config: RowConfig, device: str = "cuda", timer: Callable[[Callable[[], Any]], float] | None = None
) -> float:
    """One measurement by a `Measure` of its own."""
    return Measure(device=device, timer=timer)(key, config)


@contextlib.contextmanager
def forced(kernel: str, config: RowConfig) -> Iterator[None]:
    """kernel runs with config."""
    tables.force(kernel, config)
    try:
        yield
    finally:
        tables.force(kernel, None)


def chosen(key: tables.Key, args: Sequence[Any]) -> RowConfig:
    """The configuration that key's launcher chooses for args where there is no table."""
    device = next(a for a in args if isinstance(a, Tensor)).get_device()
    before = tables._tables.get(device)
    tables._tables[device] = {}
    forget_plans()
    try:
        with recorded() as launches:
            launcher(key)[0](*args)
    finally:
        tables._tables.pop(device)
        if before is not None:
            tables._tables[device] = before
        forget_plans()
    kernel, _, options = launches[0]
    name = kernel.fn.__name__
    variant = next((v for v in ("packed", "chunked") if f"_{v}_" in name), "one_pass")
    return RowConfig(
        options.get("BLOCK_M", 1), options["BLOCK_N"], options["num_warps"], variant,
        options.get("num_stages", RowConfig.num_stages), options.get("num_ctas", 1),
    )  # fmt: skip


def candidate_calls(keys: Iterable[tables.Key], dtypes: dict[int, torch.dtype], clusters: bool) -> list[Call]:
    """What tuning the keys launches, for `precompile`."""

    def run(key: tables.Key) -> None:
        launch, _ = launcher(key)
        sets = [arguments(key, DEVICE, rows, dtypes[key.itemsize]) for rows in (None, CHECKED_ROWS)]
        launch(*sets[0])
        for config in candidates(key, clusters):
            with forced(key.kernel, config):
                for args in sets:
                    launch(*args)

    return [Call(name_of(key, dtypes), functools.partial(run, key)) for key in keys]


def _raise_clocks(function: Callable[[], Any]) -> None:
    """Keep the GPU at work until its clocks have risen."""
    end = time.perf_counter() + CLOCKS_SECONDS
    while time.perf_counter() < end:
        for _ in range(4):
            function()
        torch.cuda.synchronize()


def _milliseconds(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=5, rep=25, return_mode="median"))
