"""The kernels that a table of configurations can hold: entered by `define`, from the declarations of the ops."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "kernels"
SHARED = ("config", "reduce", "rows")  # what every row kernel uses, as names under kernels/


@dataclass(frozen=True)
class Tuned:
    """What can be chosen for a kernel over rows, whose best configuration is measured rather than reasoned out.

    sources: the files that hold it, as names under kernels/ without .py: a change to one makes earlier measurements void.
    variants: those of RowConfig that it has. clustered: whether it runs as a cluster. chunk_rows: how many rows a program of
    the chunked variant can take at once.
    """

    sources: tuple[str, ...]
    variants: tuple[str, ...]
    clustered: bool = False
    chunk_rows: tuple[int, ...] = (1,)


KERNELS: dict[str, Tuned] = {}


def add_kernel(name: str, tuned: Tuned) -> None:
    """Let tables hold configurations of the kernel of a raw operator, layer_norm_fwd."""
    KERNELS[name] = tuned


@functools.cache
def source_hash(kernel: str) -> str:
    """The hash of the files that hold a kernel. After a change to one, earlier measurements do not count."""
    names = (*SHARED, *KERNELS[kernel].sources)
    return hashlib.sha256(b"\0".join((_FOLDER / f"{name}.py").read_bytes() for name in names)).hexdigest()
