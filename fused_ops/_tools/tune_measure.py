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
from torch.utils._python_dispatch import TorchDispatchMode

from .._runtime import tables
from .._runtime.launch import recorded
from .._runtime.plans import forget_plans
from .._torch.spec import REGISTRY, Op, Raw
from ..kernels.config import RowConfig, next_power_of_2
from ..testing import assert_within_contract
from .launches import DEVICE
from .precompile import Call
from .tune import ContextLostError, candidates

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BY_ITEMSIZE = {2: torch.bfloat16, 4: torch.float32}
CHECKED_ROWS = 32  # a multiple of 16, as most numbers of rows: so the check compiles nothing of its own
CLOCKS_SECONDS = 0.02  # of work before a key is measured: an idle GPU's clocks are low


def headline_shapes() -> list[tuple[str, int, int]]:
    """(op, M, N) of every op's headline cases, as keys have them: the shapes that matter most, the first first."""
    ranked = [(headline, op) for op in REGISTRY.values() for headline in op.bench.headline]
    ranked.sort(key=lambda pair: pair[0].rank)
    shapes = [(op, op.bench.shapes[case]) for headline, op in ranked if _tuned(op) for case in headline.cases]
    return list(dict.fromkeys((op.name, next_power_of_2(M), N) for op, (M, N) in shapes))


def _tuned(op: Op) -> list[Raw]:
    """The raw operators of an op whose kernels are tuned."""
    return [raw for raw in op.raw if raw.tuned is not None]


def _operator(key: tables.Key) -> tuple[Op, Raw]:
    """The op of a key, and its raw operator."""
    return next((op, raw) for op in REGISTRY.values() for raw in op.raw if raw.name == key.kernel)


def all_keys(itemsizes: Iterable[int] = tuple(BY_ITEMSIZE)) -> list[tables.Key]:
    """The keys of every benchmark shape for elements of so many bytes: those of headline cases first, by their rank."""
    kernels = {
        raw.name: sorted({(next_power_of_2(M), N) for M, N in op.bench.shapes.values()})  # type: ignore[misc]
        for op in REGISTRY.values() for raw in _tuned(op)
    }  # fmt: skip
    keys = [tables.Key(kernel, M, N, size) for size in itemsizes for kernel, shapes in kernels.items() for M, N in shapes]
    places = {shape: i for i, shape in enumerate(headline_shapes())}

    def value(key: tables.Key) -> tuple[int, int, bool]:
        op, raw = _operator(key)
        place = places.get((op.name, key.M, key.N), len(places))
        return list(BY_ITEMSIZE).index(key.itemsize), place, place < len(places) and not raw.forward

    return sorted(keys, key=value)


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

    A pattern is a regular expression over `name_of`, or "headline", the keys of headline cases. Several may be separated by commas.
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
            shapes = headline_shapes()
            matched = {key for key in keys if (_operator(key)[0].name, key.M, key.N) in shapes}
        else:
            matched = {key for key in keys if search(name_of(key, dtypes))}
        if not matched or not pattern:
            raise ValueError(
                f"got {pattern!r}, allowed: 'headline', or a pattern found in a name such as {name_of(keys[0], dtypes)}"
            )
        found |= matched
    return [key for key in keys if not asked or key in found]


class _FoundError(Exception):
    """The raw operator that was looked for was called: with args."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.found = args


class _Until(TorchDispatchMode):
    """Raises _FoundError at one raw operator; the others run their references."""

    def __init__(self, wanted: Raw) -> None:
        super().__init__()
        self.wanted = wanted.overload
        self.references = {raw.overload: raw.reference for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.wanted:
            raise _FoundError(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        return self.references.get(func, func)(*args, **(kwargs or {}))


def arguments(key: tables.Key, device: str, rows: int | None = None, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """The raw operator's arguments for key, or for fewer rows: those that the public function calls it with.

    The call must go by the dispatcher: in `launches.listed`, with dispatched.
    """
    op, raw = _operator(key)
    shape = (key.M if rows is None else min(key.M, rows), key.N)
    args, kwargs = op.bench.make(device, shape, dtype or BY_ITEMSIZE[key.itemsize], None)
    if not raw.forward:
        args = tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in map(_detached, args))
    try:
        with torch.set_grad_enabled(not raw.forward), _Until(raw):
            out = op.public(*args, **kwargs)
            first = out if isinstance(out, Tensor) else out[0]
            first.backward(torch.randn_like(first))
    except _FoundError as error:
        return error.found
    raise RuntimeError(f"{op.public.__name__} calls no {raw.name}")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def launcher(key: tables.Key) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(launcher, contract bound) of key's raw operator."""
    _, raw = _operator(key)
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
    variant = next((v for v in ("packed", "shared", "chunked") if f"_{v}_" in name), "one_pass")
    return RowConfig(
        options.get("BLOCK_M", 1), next_power_of_2(key.N) if variant == "shared" else options["BLOCK_N"], options["num_warps"], variant,
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

    return [Call(name_of(key, dtypes), functools.partial(run, key), dispatched=True) for key in keys]


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
