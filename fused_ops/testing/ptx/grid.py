"""A whole launch: every cluster of a grid, one after the other, on one global memory."""

from __future__ import annotations

from collections.abc import Iterator

from . import hopper, thread, warp  # noqa: F401  (they register what each instruction does)
from .machine import Code, Machine
from .memory import Global


def run_grid(code: Code, memory: Global, parameters: list[int], grid: int, shared: int, ctas: int = 1) -> Iterator[Machine]:
    """Run grid clusters of ctas programs (CTAs) each, and give each cluster's machine as it ended.

    parameters: the bits of each kernel parameter. shared: bytes of shared memory a program.
    Raises MemoryFaultError, DeadlockError or UnsupportedError at the first instruction that a GPU would get wrong.
    """
    for cluster in range(grid):
        machine = Machine(code, memory, parameters, cluster * ctas, grid * ctas, shared, ctas)
        machine.run()
        hopper.finish(machine)
        yield machine
