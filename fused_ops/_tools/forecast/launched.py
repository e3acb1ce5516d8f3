"""The forecast of launches that were counted: their limits from what the compiled kernels hold and execute.

It knows nothing of any kernel: who wrote one, and what it computes, makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .counted import Counted
from .gpus import MODEL, Gpu, host_seconds
from .limits import Launch, last_wave, longest
from .model import Forecast
from .products import cublas

LARGE_TILES = ((80.0, 1.0), (60.0, 0.9), (40.0, 0.7), (0.0, 0.5))
"""(products a byte that tiles of 16-bit elements bring at the least, share of the main loop's rate): small tiles read more
shared memory a product. 128 x 256 has 85, 128 x 128 has 64."""


def forecast_launches(launches: Sequence[Counted], gpu: Gpu, op: str = "", pass_: str = "fwd", wall: bool = False) -> Forecast:
    """The time of one pass from its launches, one after the other. wall: host time of the op is a limit too."""
    parts = tuple(launch_of(one, gpu, warm=bool(n) and _fits(one, gpu)) for n, one in enumerate(launches))
    seconds, binding = sum(part.seconds for part in parts), longest(parts).binding if parts else "launch"
    if wall and (host := host_seconds(op, pass_, gpu)) > seconds:
        return Forecast(host, "host", parts)
    return Forecast(seconds, binding, parts)


def launch_of(one: Counted, gpu: Gpu, warm: bool = False) -> Launch:
    """The forecast of one launch. warm: what it reads was written or read just before, and is in L2."""
    if one.is_aten:
        return _aten(one, gpu)
    moved = one.moved * one.grid / one.uneven
    if one.copied:
        limits = {"memory": one.bytes / gpu.copy, "tensor": _tensor(one, gpu)}
        return Launch(one.kernel, limits, floor=gpu.launch, norm=gpu.norm)
    found = _found(one, gpu)
    latency = gpu.l2_latency if warm else gpu.latency
    places = one.programs_per_sm * gpu.sms
    rounds = max(1.0, one.grid / places)
    busy = min(1.0, one.grid / gpu.sms)
    alone = rounds * one.instructions / one.uneven / (gpu.warp_issue * gpu.clock)  # few warps do not fill the slots
    total = max(one.total / gpu.sms / gpu.slots / busy, alone)
    waiting = rounds * one.waits * latency / one.uneven
    flying = one.read * latency / (one.resident(gpu) * one.in_flight) if one.ahead and one.in_flight else 0.0
    limits = {
        "memory": 0.0 if warm else (one.bytes + one.again * (1.0 - found)) / gpu.copy,
        "L2": max(moved, one.bytes) / (gpu.l2_rate * busy),
        "issue": total,
        "special functions": one.grid * one.num_warps * one.mufu / one.uneven / (gpu.sms * gpu.mufu * gpu.clock * busy),
        "in flight": max(waiting, flying),
    }
    if one.flops:
        limits["tensor"] = _tensor(one, gpu)
    if not one.ahead and min(one.programs_per_sm, -(-one.grid // gpu.sms)) == 1 and one.grid >= gpu.sms:
        limits["chain"] = waiting + total + moved / gpu.sms / gpu.sm_bytes
    waste = one.uneven if one.grid <= places else last_wave(one.grid, places, MODEL["last_wave_felt"])
    return Launch(one.kernel, limits, waste, gpu.launch, gpu.norm)


def _fits(one: Counted, gpu: Gpu) -> bool:
    return one.bytes < gpu.l2_share * gpu.l2_bytes


def _found(one: Counted, gpu: Gpu) -> float:
    """The part of second reads that L2 still has."""
    footprint = one.l2_footprint(gpu)
    return min(1.0, gpu.l2_share * gpu.l2_bytes / footprint) if footprint else 1.0


def _tensor(one: Counted, gpu: Gpu) -> float:
    """Products, and what does not overlap them: the epilogue, where a program has its SM alone; sums of partial sums."""
    brought = one.copied or one.moved
    speed = next(speed for least, speed in LARGE_TILES if one.flops * one.itemsize / 2 >= least * brought)
    rate = gpu.rates[one.itemsize] / gpu.sms * MODEL["tensor_share"] * speed
    main = one.flops / rate + one.drained * one.num_warps / gpu.slots
    epilogue = one.outside * one.num_warps / gpu.slots
    together = min(one.programs_per_sm, -(-one.grid // gpu.sms))
    each = main + epilogue + gpu.latency if together == 1 else max(main, epilogue) + gpu.latency / together
    return math.ceil(one.grid / gpu.sms) * each


def _aten(one: Counted, gpu: Gpu) -> Launch:
    if one.m:
        return cublas(one.m, one.n, one.k, one.itemsize, gpu)
    return Launch(one.kernel, {"memory": one.bytes / gpu.copy / MODEL["aten_share"]}, floor=gpu.launch, norm=gpu.norm)


class Columns(NamedTuple):
    """What the audit shows of a counted launch."""

    instructions_per_element: float
    programs_per_sm: int
    bytes_in_flight_per_sm: int
    barriers_per_row: float
    l2_footprint_bytes: int
    forecast_us: float
    percent_of_limit: float
    bound_by: str


def columns(one: Counted, gpu: Gpu) -> Columns:
    """The audit's columns. percent_of_limit: of the time that the tensors' bytes, or the products, take at the least."""
    launch = launch_of(one, gpu)
    least = max(one.bytes / gpu.copy, one.grid * one.flops / one.uneven / gpu.rates[one.itemsize] if one.flops else 0.0)
    return Columns(
        round(one.instructions_per_element, 2), one.programs_per_sm, one.in_flight_per_sm(gpu), round(one.barriers_per_row, 2),
        one.l2_footprint(gpu), round(launch.seconds * 1e6, 2), round(100 * least / launch.seconds, 1), launch.binding,
    )  # fmt: skip
