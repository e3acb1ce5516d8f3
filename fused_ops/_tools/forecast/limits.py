"""One launch's limits, each in seconds, and how they join into its time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The forecast of one launch.

    limits: seconds that each thing alone would take: "memory", "issue", "in flight" (too few bytes on the way), "chain" (a
    program that is alone on its SM: load, compute, store), "tensor" (products and what does not overlap them), "special
    functions". waste: the factor of a last wave that does not fill the GPU. floor: seconds of the launch itself.
    """

    name: str
    limits: Mapping[str, float]
    waste: float = 1.0
    floor: float = 0.0
    norm: float = 4.0

    @property
    def seconds(self) -> float:
        longest = max(self.limits.values(), default=0.0)
        if longest == 0.0:
            return self.floor
        # Scaled by the longest, so that nothing underflows.
        joined = longest * sum((value / longest) ** self.norm for value in self.limits.values()) ** (1 / self.norm)
        return joined * self.waste + self.floor

    @property
    def binding(self) -> str:
        """The limit that takes longest; "launch" where the launch itself does."""
        name = max(self.limits, key=lambda key: self.limits[key], default="launch")
        return "launch" if self.limits.get(name, 0.0) * self.waste < self.floor else name


def last_wave(programs: int, places: int, felt: float = 1.0) -> float:
    """The factor of the last wave: 1 where all programs run at once, or where the waves are full. felt: the part of its
    emptiness that costs time."""
    waves = programs / max(places, 1)
    return 1.0 + felt * (math.ceil(waves) / waves - 1.0) if waves > 1 else 1.0


def longest(launches: Iterable[Launch]) -> Launch:
    """The launch that takes longest."""
    return max(launches, key=lambda launch: launch.seconds)
