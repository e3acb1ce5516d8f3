"""Small calls that launch every kernel of kernels/, each program with several tiles, rows or chunks: the main kernels.

What one tile leaves in shared memory is the next one's, so a case whose programs have one tile each shows nothing of it.
The cases follow from the registry: every op, forward and backward, in every variant or kind of tile that it has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import JITFunction

from fused_ops import REGISTRY, fused_softmax
from fused_ops.kernels.config import CLUSTER_CTAS, MatmulConfig, RowConfig, has_clusters
from fused_ops.ops.linear.matmul_plan import forced_config
from fused_ops.testing import Op, forced, watch_launches
from fused_ops.testing.ptx.gpu import Device, device
from tests.contract import leaves

ROWS, COLUMNS = 9, 500  # rows: more than two for each of the four programs that a backward has on one SM
FP8_SHAPES = ((ROWS, 1000), (1, 20480))  # of row ops that choose by the length of a row alone: in one pass, in chunks
INNER = {"one_pass": (50, 64), "chunked": (100, 64)}
TILES = {  # name: (capability, tile, (M, N, K)): more tiles than one program, each overhanging, and more steps of K than stages
    "pointer_sm80": (80, MatmulConfig(32, 32, 32, 4, 3), (40, 80, 160)),
    "pointer_sm90": (90, MatmulConfig(64, 64, 32, 4, 3), (72, 72, 160)),
    "split_k": (80, MatmulConfig(16, 32, 32, 4, 3, kind="split_k", splits=2), (16, 64, 640)),
    "tma": (90, MatmulConfig(64, 64, 64, 4, 3, kind="tma", subtiles=2), (72, 80, 272)),
    "tma_8_warps": (90, MatmulConfig(128, 128, 64, 8, 3, kind="tma", subtiles=2), (136, 144, 208)),
}
BACKWARD_TILES = ("pointer_sm80", "tma")  # a backward's products are the forward's kernels; its own are tried in these
CLUSTERS = has_clusters((9, 0), tuple(map(int, triton.__version__.split(".")[:2])))


@dataclass(frozen=True)
class Case:
    """prepare: runs what comes before, and gives the call whose launches are looked at. compiles: whether this Triton compiles them."""

    name: str
    arch: int
    prepare: Callable[[], Callable[[], Any]]
    configs: tuple[Callable[[], Any], ...] = ()
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
        """The names of the kernels that the call launches. Nothing is compiled or run."""
        names: list[str] = []

        def note(kernel: Any, *_: Any) -> bool:
            names.append(kernel.__name__)
            return True

        with self.ready(note) as (_, call):
            names.clear()
            call()
        return set(names)


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
            columns = COLUMNS - 4  # whole pairs of vectors
            found = {variant: configs[variant] for variant in raw.tuned.variants}
            if raw.tuned.clustered:
                found["cluster"] = RowConfig(1, 8 * 512, 4, num_ctas=CLUSTER_CTAS)
            for variant, config in found.items():
                cluster = config.num_ctas > 1
                shape = (3, 8 * columns) if cluster else (ROWS, columns)
                dtype = torch.bfloat16 if variant == "packed" else torch.float32
                call = _call(op, not raw.forward, shape, dtype, None)
                force = lambda name=raw.name, config=config: forced(name, config)  # noqa: E731
                yield Case(f"{raw.name}_{variant}", 90, call, (force,), CLUSTERS or not cluster)


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
    seen = set()
    for op in REGISTRY.values():
        for raw in op.raw if op.roles.multiplies else ():
            for name in TILES if raw.forward else BACKWARD_TILES:
                arch, tile, shape = TILES[name]
                dtype = op.bench.dtypes[0]
                call = _call(op, not raw.forward, shape, dtype, op.bench.variants[-1])
                force = lambda tile=tile: forced_config(tile)  # noqa: E731
                case = Case(f"{raw.name}_{name}", arch, call, (force,))
                new = {(name, dtype, kernel) for kernel in case.kernels()} - seen
                seen |= new
                if new:
                    yield case


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
