"""`fused-ops tune`: candidates of the row kernels, measured, and the fastest kept in the user's table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .._runtime.tables import Key, Machine, check_config, save, saved
from .._runtime.tuned_kernels import KERNELS
from ..kernels.config import CLUSTER_CTAS, RowConfig, next_power_of_2

MIN_CLUSTERED = 32768  # columns of the shortest block that clusters are tried for
LEAST_GAIN = 0.02  # by how much a candidate must be faster than the heuristic's configuration
FINALISTS, ROUNDS = 2, 3  # the fastest are measured again, in turns with the heuristic's configuration


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
        if "shared" in KERNELS[key.kernel].variants:
            found.append(RowConfig(1, block_n, warps, "shared"))
        if key.N > 8192 and warps >= 4:
            rows = KERNELS[key.kernel].chunk_rows
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


class ContextLostError(RuntimeError):
    """The GPU answers no more: nothing that this process measures from here on can be believed."""


@dataclass(frozen=True)
class Result:
    """One key's outcome. time, heuristic: microseconds of config and of the heuristic's configuration, None if that failed."""

    key: Key
    config: RowConfig
    time: float
    heuristic: float | None

    @property
    def gain(self) -> float:
        """How many times as fast as the heuristic's configuration; 1 where that was kept, or could not be measured."""
        return 1.0 if self.heuristic is None else self.heuristic / self.time


@dataclass
class Tuned:
    """What came of tuning: the table's entries, the results of the keys measured now, and why it stopped early, or "".

    asked: how many keys were not in the table before. failed: those of which nothing could be measured. lost: whether it
    stopped because the GPU answers no more.
    """

    entries: dict[Key, tuple[RowConfig, float]]
    results: list[Result] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    asked: int = 0
    stopped: str = ""
    lost: bool = False

    def summary(self, seconds: float) -> str:
        """One line for people."""
        faster = [result.gain for result in self.results if result.gain > 1.0]
        text = f"{len(self.results)} of {self.asked} keys in {seconds:.0f} s, {len(faster)} faster than the heuristic"
        if faster:
            text += f" (median {statistics.median(faster):.2f}x)"
        if self.failed:
            text += f", {len(self.failed)} could not be measured ({', '.join(self.failed[:3])})"
        return f"{text}; stopped: {self.stopped}" if self.stopped else text


def tune(
    keys: Iterable[Key], owner: Machine, measure: Callable[[Key, RowConfig], float],
    heuristic: Callable[[Key], RowConfig | None] = lambda _: None, again: bool = False,
    done: Callable[[Result | None], None] = lambda _: None, over: Callable[[], bool] = lambda: False,
) -> Tuned:  # fmt: skip
    """Measure the candidates of each key and save the best after each, so that a run that was stopped goes on.

    measure(key, config) gives microseconds, raises where the configuration does not compile or is wrong, and raises
    ContextLostError where nothing more can be measured: that ends the tuning. heuristic(key): the configuration without a table; it
    is measured with the candidates, and is kept unless one is faster by more than LEAST_GAIN. Keys in the user's table already
    are passed over, unless again. done: called after each key. over(): whether to stop; a key that is not finished is dropped.
    """
    tuned = Tuned(saved(owner))
    wanted = list(keys)
    todo = [key for key in wanted if again or key not in tuned.entries]
    tuned.asked = len(todo)
    for _ in range(len(wanted) - len(todo)):
        done(None)
    for key in todo:
        try:
            result = None if over() else _best(key, owner, measure, heuristic, over)
        except ContextLostError as error:
            tuned.lost = True
            tuned.stopped = f"the GPU's context was lost at {key.kernel} {key.M}x{key.N}: {error}"
            break
        except Exception:  # a configuration that had run does not any more: the other keys may
            result = None
        if over() and result is None:
            tuned.stopped = "the time was over"
            break
        if result is None:
            tuned.failed.append(f"{key.kernel} {key.M}x{key.N}")
        else:
            tuned.results.append(result)
            tuned.entries[key] = result.config, result.time
            save(owner, tuned.entries)
        done(result)
    return tuned


def _best(
    key: Key, owner: Machine, measure: Callable[[Key, RowConfig], float], heuristic: Callable[[Key], RowConfig | None],
    over: Callable[[], bool],
) -> Result | None:  # fmt: skip
    """The best configuration of key, or None where none runs, or where the time was over before all were measured."""
    times: dict[RowConfig, float] = {}
    try:
        chosen = heuristic(key)
    except ContextLostError:
        raise
    except Exception:  # then there is nothing to compare with
        chosen = None
    configs = candidates(key, owner.clusters)
    if chosen is not None:
        configs = [chosen, *(config for config in configs if config != chosen)]
    for config in configs:
        if over():
            return None
        try:
            time = measure(key, config)
        except ContextLostError:
            raise
        except Exception:  # the compiler's failures have many types; a configuration that fails is no candidate
            continue
        if 0 < time < math.inf:
            times[config] = time
    if not times:
        return None
    finalists = sorted(times, key=lambda config: times[config])[:FINALISTS]
    if chosen in times and len(times) > 1:
        finalists = list(dict.fromkeys([chosen, *finalists]))
        rounds = [{config: measure(key, config) for config in finalists} for _ in range(ROUNDS)]
        times = {config: statistics.median(one[config] for one in rounds) for config in finalists}
    best = min(finalists, key=lambda config: times[config])
    before = times.get(chosen) if chosen is not None else None
    if chosen is not None and before is not None and before <= times[best] * (1 + LEAST_GAIN):
        best = chosen
    return Result(key, best, times[best], before)
