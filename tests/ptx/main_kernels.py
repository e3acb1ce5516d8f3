"""Small calls that launch every kernel of kernels/, each program with several tiles, rows or chunks: the main kernels.

What one tile leaves in shared memory is the next one's, so a case whose programs have one tile each shows nothing of it.
The cases follow from the registry: every op, forward and backward, in every variant or kind of tile that it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton import JITFunction

from fused_ops import REGISTRY, fused_softmax
from fused_ops.kernels.config import CLUSTER_CTAS, SHARED_COLUMNS, MatmulConfig, RowConfig, has_clusters, next_power_of_2
from fused_ops.ops.linear.matmul_plan import forced_config
from fused_ops.testing import Op, forced, watch_launches
from fused_ops.testing.ptx.gpu import Device, device
from tests.contract import leaves

ROWS, COLUMNS = 9, 496  # rows: more than two for each of the four programs that a backward has on one SM
FP8_SHAPES = ((ROWS, 1000), (1, 20480))  # of row ops that choose by the length of a row alone: in one pass, in chunks
INNER = {"one_pass": (50, 64), "chunked": (100, 64)}
TILES = {  # name: (capability, tile, (M, N, K)): more tiles than one program, each overhanging, and more steps of K than stages
    "pointer_sm80": (80, MatmulConfig(32, 32, 32, 4, 3), (24, 144, 144)),
    "pointer_sm90": (90, MatmulConfig(64, 64, 32, 4, 3), (72, 72, 160)),
    "split_k": (80, MatmulConfig(16, 32, 32, 4, 3, kind="split_k", splits=2), (16, 64, 640)),
    "tma": (90, MatmulConfig(64, 64, 32, 4, 3, kind="tma", subtiles=2), (104, 112, 112)),
    "tma_8_warps": (90, MatmulConfig(128, 128, 64, 8, 3, kind="tma", subtiles=2), (136, 120, 208)),
}
ONCE = ("split_k", "tma_8_warps")  # for the first op alone: what they change, all ops share
BACKWARD = ("pointer_sm80", "tma")  # a backward's products are the forward's kernels; its own are tried in these
CLUSTERS = has_clusters((9, 0), tuple(map(int, triton.__version__.split(".")[:2])))


@dataclasses.dataclass(frozen=True)
class Case:
    """prepare: runs what comes before, and gives the call whose launches are looked at.

    own: the kernels of these launches that no case before has; None for all. compiles: whether this Triton compiles them.
    """

    name: str
    arch: int
    prepare: Callable[[], Callable[[], Any]]
    configs: tuple[Callable[[], Any], ...] = ()
    own: frozenset[str] | None = None
    compiles: bool = True

    @contextlib.contextmanager
    def ready(self, watcher: Callable[..., bool] | None = None) -> Iterator[tuple[Device, Callable[[], Any]]]:
        """A device of one SM, and the call. What is launched is run there, or given to the watcher."""
        torch.manual_seed(0)
        with contextlib.ExitStack() as stack:
            for config in self.configs:
                stack.enter_context(config())
            gpu = stack.enter_context(device(self.arch, sms=1))
            if watcher is not None:
                watch_launches(watcher)  # device puts back what was before it
            yield gpu, self.prepare()

    def kernels(self) -> set[str]:
        """The names of the kernels that are looked at. Nothing is compiled or run."""
        names: list[str] = []

        def note(kernel: Any, *_: Any) -> bool:
            names.append(kernel.__name__)
            return True

        with self.ready(note) as (_, call):
            names.clear()
            call()
        return {name for name in names if self.owns(name)}

    def owns(self, kernel: str) -> bool:
        """Whether launches of a kernel are looked at."""
        return self.own is None or kernel in self.own


def _call(op: Op, backward: bool, *made: Any) -> Callable[[], Callable[[], Any]]:
    """What prepares the forward or the backward of an op on its benchmark's arguments, made with ("cpu", *made)."""

    def prepare() -> Callable[[], Any]:
        args, kwargs = op.bench.make("cpu", *made)
        if not backward:
            return lambda: op.public(*args, **kwargs)
        args, wanted = leaves(args)
        out = op.public(*args, **kwargs)
        dy = torch.randn(out.shape).to(out.dtype)
        return lambda: torch.autograd.grad(out, wanted, dy, retain_graph=True)

    return prepare


def _row_cases() -> Iterator[Case]:
    """The tuned kernels in each of their variants, and as clusters; then the row ops that choose by themselves."""
    for op in REGISTRY.values():
        for raw in op.raw:
            if raw.tuned is None:
                if not op.roles.multiplies:
                    for shape in FP8_SHAPES:
                        yield Case(f"{raw.name}_{shape[1]}", 90, _call(op, not raw.forward, shape, torch.bfloat16, None))
                continue
            configs = {
                "one_pass": RowConfig(1, 512, 4),
                "chunked": RowConfig(min(2, max(raw.tuned.chunk_rows)), 256, 4, "chunked", num_stages=3),
                "packed": RowConfig(1, 512, 4, "packed"),
            }
            if "shared" in raw.tuned.variants:
                long = SHARED_COLUMNS[raw.name][0] + 8
                configs["shared"] = RowConfig(1, next_power_of_2(long), 16, "shared")
            found = {variant: configs[variant] for variant in raw.tuned.variants}
            if len(raw.tuned.chunk_rows) > 1:  # sums over rows: several warps hold each column of them, one of which writes it
                found["chunked_repeated"] = RowConfig(4, 128, 8, "chunked")
            if raw.tuned.clustered:
                found["cluster"] = RowConfig(1, CLUSTER_CTAS * 512, 4, num_ctas=CLUSTER_CTAS)
            for variant, config in found.items():
                cluster = config.num_ctas > 1
                shape = (3, CLUSTER_CTAS * COLUMNS if cluster else long) if cluster or variant == "shared" else (ROWS, COLUMNS)
                dtype = torch.bfloat16 if variant in ("packed", "shared") else torch.float32
                call = _call(op, not raw.forward, shape, dtype, None)
                force = lambda name=raw.name, config=config: forced(name, config)  # noqa: E731
                yield Case(f"{raw.name}_{variant}", 90, call, (force,), compiles=CLUSTERS or not cluster)


def _inner_cases() -> Iterator[Case]:
    """Softmax over a dimension that is not the last."""
    for backward in (False, True):
        for variant, shape in INNER.items():

            def prepare(backward: bool = backward, shape: tuple[int, int] = shape) -> Callable[[], Any]:
                x = torch.randn(shape, requires_grad=backward)
                y, dy = fused_softmax(x, 0), torch.randn(shape)
                if backward:
                    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)
                return lambda: fused_softmax(x, 0)

            yield Case(f"softmax_inner_{'bwd' if backward else 'fwd'}_{variant}", 90, prepare)


def _product_cases() -> Iterator[Case]:
    """The ops with a weight, in each kind of tile, where they launch a kernel that no op before them did in that tile and dtype."""
    seen: set[Any] = set()
    for i, op in enumerate(op for op in REGISTRY.values() if op.roles.multiplies):
        for raw in op.raw:
            for name in (name for name in TILES if not i or name not in ONCE) if raw.forward else BACKWARD:
                arch, tile, shape = TILES[name]
                dtype = op.bench.dtypes[0]
                call = _call(op, not raw.forward, shape, dtype, op.bench.variants[-1])
                force = lambda tile=tile: forced_config(tile)  # noqa: E731
                case = Case(f"{raw.name}_{name}", arch, call, (force,))
                keys = {(name, dtype, raw.forward, kernel): kernel for kernel in case.kernels()}
                own = frozenset(kernel for key, kernel in keys.items() if key not in seen)
                seen |= set(keys)
                if own:
                    yield dataclasses.replace(case, own=own)


@functools.cache
def cases() -> dict[str, Case]:
    """All cases by name."""
    return {case.name: case for case in (*_row_cases(), *_inner_cases(), *_product_cases())}


def kernel_names() -> set[str]:
    """The names of all kernels of kernels/: its compiled functions that are launched."""
    import fused_ops.kernels

    names = set()
    for found in pkgutil.walk_packages(fused_ops.kernels.__path__, "fused_ops.kernels."):
        module = importlib.import_module(found.name)
        names |= {name for name, value in vars(module).items() if name.endswith("_kernel") and isinstance(value, JITFunction)}
    return names
