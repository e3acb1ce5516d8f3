"""One launch as the audit counts it, and what follows from its counts: everything that the forecast of a launch needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .gpus import Gpu

ATEN = "aten::"


@dataclass(frozen=True)
class Counted:
    """A launch of one of our kernels, or of ATen's (its name begins with "aten::", and it has bytes, itemsize, m, n, k alone).

    registers, spill_bytes: a thread's. shared_bytes: a program's. programs_per_sm: that an SM holds. rows, elements: of the
    largest tensor. bytes: of all tensors; read: of those read; again: read a second time, by all programs; apart: what a program
    moves between the two. Of the first program, a warp's instructions: instructions, outside (of loops of products), drained
    (inside them, where partial sums are added), mufu, lds, sts, shfl, barriers; uneven: over the mean program's. flops, copied
    (by tensor copies), moved (bytes read and written), waits (for loads; hot_waits: of what
    L1 holds), in_flight (bytes on the way at the most): a program's. ahead: groups of copies on the way during its work.
    static: instructions in the code; loops: depth:instructions of each. unknown: branches that counting could not decide.
    """

    kernel: str
    config: str = ""
    grid: int = 1
    num_warps: int = 4
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    programs_per_sm: int = 1
    rows: int = 0
    elements: int = 0
    itemsize: int = 2
    bytes: int = 0
    read: int = 0
    again: int = 0
    apart: int = 0
    static: int = 0
    loops: str = ""
    instructions: int = 0
    outside: int = 0
    drained: int = 0
    uneven: float = 1.0
    mufu: int = 0
    lds: int = 0
    sts: int = 0
    shfl: int = 0
    barriers: int = 0
    flops: int = 0
    copied: int = 0
    moved: int = 0
    waits: int = 0
    hot_waits: int = 0
    in_flight: int = 0
    ahead: int = 0
    unknown: int = 0
    m: int = 0
    n: int = 0
    k: int = 0

    @property
    def is_aten(self) -> bool:
        return self.kernel.startswith(ATEN)

    @property
    def total(self) -> float:
        """Warp instructions of all programs."""
        return self.grid * self.num_warps * self.instructions / self.uneven

    @property
    def instructions_per_element(self) -> float:
        """Instructions of a thread for each element of the largest tensor."""
        return 32 * self.total / self.elements if self.elements else 0.0

    @property
    def barriers_per_row(self) -> float:
        """Barriers that a program waits at for each row, or tile of one program, that it works on."""
        each = self.rows / self.grid if self.rows else 1.0
        return self.barriers / max(1.0, each)

    def resident(self, gpu: Gpu) -> int:
        """Programs that are on the GPU at once."""
        return min(self.grid, self.programs_per_sm * gpu.sms)

    def in_flight_per_sm(self, gpu: Gpu) -> int:
        """Bytes that the programs of an SM have on the way at the most."""
        return self.in_flight * min(self.programs_per_sm, -(-self.grid // gpu.sms))

    def l2_footprint(self, gpu: Gpu) -> int:
        """Bytes that all programs move between the first and the second read of a place; 0 where they read once."""
        return self.apart * self.resident(gpu)

    @classmethod
    def of(cls, row: Mapping[str, Any], case: Mapping[str, Any]) -> Counted:
        """From a row of kernels/aot.py, and the case that it was compiled from."""
        launch = case["launch"]
        itemsize = {"fp32": 4, "fp8e4nv": 1}.get(case["dtype"], 2)
        return cls(
            row["kernel"], row["config"], launch["grid"], row["num_warps"], row["registers"], row["spill_bytes"],
            row["shared_bytes"], row["occupancy"], launch["values"].get("M", 0), launch["elements"], itemsize,
            **row["counted"],
        )  # fmt: skip

    @classmethod
    def aten(cls, name: str, nbytes: int, itemsize: int, product: tuple[int, int, int] | None) -> Counted:
        """A kernel of ATen's or cuBLAS."""
        m, n, k = product or (0, 0, 0)
        return cls(ATEN + name, bytes=nbytes, itemsize=itemsize, m=m, n=n, k=k)

    @classmethod
    def parsed(cls, texts: Mapping[str, str]) -> Counted:
        """From the text of each field; ValueError where one is missing or no number."""
        kinds = {"int": int, "float": float, "str": str}
        try:
            return cls(**{f.name: kinds[str(f.type)](texts[f.name]) for f in dataclasses.fields(cls)})
        except KeyError as error:
            raise ValueError(f"no field {error}") from None
