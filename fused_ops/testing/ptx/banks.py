"""How many wavefronts a warp's access of shared memory takes: its bank conflicts.

Shared memory has 32 banks of 4 bytes; in one wavefront each gives or takes one word. Lanes that want the same word share it.
An access of 8 bytes a lane is served by half warps, one of 16 bytes by quarters, which is how ldmatrix and stmatrix take the
8 rows of a matrix, too. NVIDIA documents no more than that: where lanes of two halves or quarters want the same words, a GPU
may take fewer wavefronts than are counted here.

Not counted: what is not a warp's instruction (wgmma's reads, TMA), and shared::cluster, which crosses a network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

BANKS, WORD, LANES = 32, 4, 32
_COUNTED = re.compile(r"(?:@\S+ )?(?:(?:ld|st)\.(?!.*shared::cluster)|(?:ld|st)matrix\.|cp\.async\.(?!bulk))")


def wavefronts(offsets: np.ndarray, lanes: np.ndarray, size: int) -> tuple[int, int]:
    """(wavefronts, ideal) of the warps that access size bytes at each offset, by these lanes.

    ideal: as many as without a bank conflict, one for the distinct words of all lanes that are served together.
    """
    words = (offsets // WORD)[:, None] + np.arange(max(1, size // WORD))
    together = min(LANES, BANKS * WORD // size)  # lanes: their words are at most as many as the banks
    wanted = np.unique((lanes // together)[:, None].astype(np.int64) << 32 | words)
    served, bank = wanted >> 32, wanted % BANKS
    by_bank = np.bincount(served * BANKS + bank, minlength=(int(served[-1]) + 1) * BANKS).reshape(-1, BANKS)
    most = by_bank.max(1)
    return int(most.sum()), int(np.count_nonzero(most))


@lru_cache(maxsize=1 << 12)
def _known(offsets: bytes, lanes: bytes, size: int) -> tuple[int, int]:
    """wavefronts(), which every program of a launch, and every turn of its loops, asks for the same places."""
    return wavefronts(np.frombuffer(offsets, np.int64), np.frombuffer(lanes, np.int64), size)


@lru_cache(maxsize=1 << 12)
def _counts(what: str) -> bool:
    return _COUNTED.match(what) is not None


@dataclass
class Wavefronts:
    """The wavefronts of shared memory that a launch took, by instruction: `taken`, and `ideal` as wavefronts() has it."""

    taken: dict[str, int] = field(default_factory=dict)
    ideal: dict[str, int] = field(default_factory=dict)

    def count(self, offsets: np.ndarray, lanes: np.ndarray, size: int, what: str) -> None:
        """Add what the instruction takes to access size bytes at each offset, by these lanes."""
        if _counts(what):
            taken, ideal = _known(offsets.tobytes(), lanes.tobytes(), size)
            self.taken[what] = self.taken.get(what, 0) + taken
            self.ideal[what] = self.ideal.get(what, 0) + ideal
