"""A whole launch: every cluster of a grid, one after the other, on one global memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import thread, tma, warp, wgmma  # noqa: F401  (they register what each instruction does)
from .machine import Code, Machine
from .memory import Global


def run_grid(
    code: Code, memory: Global, parameters: list[int], grid: int, shared: int, ctas: int = 1, seed: int | None = None
) -> Iterator[Machine]:
    """Run grid clusters of ctas programs (CTAs) each, and give each cluster's machine as it ended.

    parameters: the bits of each kernel parameter. shared: bytes of shared memory a program. seed: draws the order of the
    clusters and of the warps in them; None runs them in the order of their numbers.
    Raises MemoryFaultError, DeadlockError or UnsupportedError at the first instruction that a GPU would get wrong.
    """
    clusters = np.arange(grid) if seed is None else np.random.default_rng(seed).permutation(grid)
    for cluster in clusters.tolist():
        machine = Machine(code, memory, parameters, cluster * ctas, grid * ctas, shared, ctas, seed)
        machine.run()
        tma.finish(machine)
        yield machine
