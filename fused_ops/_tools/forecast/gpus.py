"""What a GPU can do, as the few numbers that a forecast needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Gpu:
    """The coefficients of one GPU.

    copy: bytes/s of a large device copy, read and written. rates: FLOP/s of a large cuBLAS product, by bytes an element.
    sms, capability, l2_bytes: from its data sheet. clock: Hz under load. launch: seconds that a kernel takes at the least in a
    replayed CUDA graph. latency: seconds from a load to its data while the memory is busy. issue_share: the part of the issue
    slots (4 an SM a clock) that a kernel can fill. sm_bytes: bytes/s between one SM and L2. l2_share: the part of L2 that a
    second read finds. norm: p of the p-norm that joins limits which overlap; infinity is the longest alone.
    """

    name: str
    copy: float
    rates: Mapping[int, float]
    sms: int = 132
    capability: tuple[int, int] = (9, 0)
    clock: float = 1.755e9
    l2_bytes: float = 50e6
    launch: float = 2.2e-6
    latency: float = 750e-9
    issue_share: float = 0.80
    mufu: float = 0.5
    sm_bytes: float = 112e9
    l2_share: float = 0.6
    norm: float = 4.0

    def issue(self, programs: float, instructions: float, warps: int) -> float:
        """Seconds to issue so many instructions a warp, in programs of so many warps, on all SMs."""
        return programs * instructions * warps / (self.sms * 4 * self.issue_share * self.clock)

    def special(self, elements: float) -> float:
        """Seconds of one special function (exp2, reciprocal) an element, on all SMs."""
        return elements / 32 / (self.sms * self.mufu * self.clock)


SOURCES: Mapping[str, str] = MappingProxyType({
    "copy, rates": "device copy and 8192^3 products that others report for the card (1 byte, 4 bytes: belief)",
    "sms, capability, l2_bytes": "data sheet", "clock": "boost clock of the SXM5 card; belief under load",
    "launch": "belief", "latency": "belief", "issue_share": "belief", "mufu": "CUDA programming guide: 16 results a clock an SM",
    "sm_bytes": "64 bytes a clock", "l2_share": "belief", "norm": "belief",
})  # fmt: skip
"""Field -> where its value is from."""

_HOPPER_RATES = MappingProxyType({1: 1.4e15, 2: 798e12, 4: 50e12})
GPUS: Mapping[str, Gpu] = MappingProxyType({
    "h100": Gpu("h100", 3.0e12, _HOPPER_RATES),
    "h200": Gpu("h200", 4.3e12, MappingProxyType({**_HOPPER_RATES, 2: 790e12})),
})  # fmt: skip
"""Short name -> coefficients."""

_NAMES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}


def gpu_named(name: str) -> Gpu | None:
    """The coefficients for a short name, or for a name as torch.cuda.get_device_name gives it; None where there are none."""
    return GPUS.get(_NAMES.get(name, name.lower()))
