"""`fused-ops tune`: candidates of the row kernels, measured, and the fastest kept in the user's table."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .._runtime.tables import Key, Machine, check_config, forget_tables, save, saved
from ..kernels.config import CLUSTER_CTAS, RowConfig, next_power_of_2

MIN_CLUSTERED = 32768  # columns of the shortest block that clusters are tried for


def candidates(key: Key, clusters: bool = False) -> list[RowConfig]:
    """The configurations that tuning tries for key. clusters: whether the GPU and Triton run clusters."""
    block_n = next_power_of_2(key.N)
    values = 2 if key.kernel.endswith("bwd") else 1  # rows of values that a program holds
    found = []
    for warps in (1, 2, 4, 8, 16, 32):
        for block_m in (1, 2, 4, 8, 16, 32):
            per_thread = values * block_m * block_n // (32 * warps)
            if block_n <= 65536 and 4 <= per_thread <= 64:
                found.append(RowConfig(block_m, block_n, warps))
        if key.itemsize == 2 and key.N >= 2048 and 8 <= values * block_n // (32 * warps) <= 128:
            found.append(RowConfig(1, block_n, warps, "packed"))
        if key.N > 8192 and warps >= 4:
            rows = (1, 2, 4, 8) if key.kernel == "layer_norm_bwd" else (1,)
            found += [
                RowConfig(m, n, warps, "chunked") for m in rows for n in (2048, 4096, 8192) if m * n // (32 * warps) <= 64
            ]
        if clusters:
            found += _cluster_candidates(block_n, warps, values)
    return [config for config in found if _fits(key, config, clusters)]


def _cluster_candidates(block_n: int, num_warps: int, values: int) -> list[RowConfig]:
    """The clusters that tuning tries for rows of up to block_n columns.

    values: how many rows of values a program keeps in registers (it keeps its part of each).
    """
    found = []
    for num_ctas in (2, 4, CLUSTER_CTAS):
        per_thread = values * block_n // (32 * num_warps * num_ctas)
        for variant, most in (("one_pass", 64), ("packed", 128)):
            if block_n >= MIN_CLUSTERED and num_warps >= 4 and 8 <= per_thread <= most:
                found.append(RowConfig(1, block_n, num_warps, variant, num_ctas=num_ctas))
    return found


def _fits(key: Key, config: RowConfig, clusters: bool) -> bool:
    try:
        check_config(key, config, clusters)
    except ValueError:
        return False
    return True


def tune(
    keys: Iterable[Key], owner: Machine, measure: Callable[[Key, RowConfig], float], again: bool = False,
    done: Callable[[], None] = lambda: None,
) -> dict[Key, tuple[RowConfig, float]]:  # fmt: skip
    """Measure the candidates of each key and save the fastest after each, so that a run that was stopped goes on.

    measure(key, config) gives microseconds, or raises where the configuration does not compile or is wrong. Keys in
    the user's table already are passed over, unless again. Returns the table's entries.
    """
    entries = saved(owner)
    for key in keys:
        if again or key not in entries:
            best: tuple[RowConfig, float] | None = None
            for config in candidates(key, owner.clusters):
                try:
                    time = measure(key, config)
                except Exception:  # the compiler's failures have many types; a configuration that fails is no candidate
                    continue
                if best is None or time < best[1]:
                    best = config, time
            if best is not None:
                entries[key] = best
                save(owner, entries)
        done()
    forget_tables()
    return entries
