"""How `fused-ops tune` chooses: what is measured in which order, what is kept, and when it stops. No GPU in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fused_ops._runtime import tables
from fused_ops._runtime.launch_path import triton_version
from fused_ops._runtime.tables import Key, Machine
from fused_ops._tools import launches, precompile, tune, tune_measure
from fused_ops._tools.launches import Gpu
from fused_ops.export.cli import app
from fused_ops.kernels.config import RowConfig, has_clusters

OWNER = Machine("NVIDIA Test 80GB", "3.9.0")
KEY = Key("softmax_fwd", 4096, 1000, 2)
CONFIG = RowConfig(1, 1024, 4)
H100 = Gpu("NVIDIA Test 80GB", (9, 0), 132)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSED_OPS_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    tables._tables.clear()


BACKWARD = Key("layer_norm_bwd", 64, 512, 4)


@pytest.mark.parametrize(("best_time", "kept"), [(9.9, False), (9.0, True)], ids=["by_1_percent", "by_11_percent"])
def test_the_heuristic_is_kept_unless_a_candidate_is_faster_by_more_than_2_percent(best_time: float, kept: bool) -> None:
    best = next(config for config in tune.candidates(KEY) if config != CONFIG)
    times = {CONFIG: 10.0, best: best_time}
    tuned = tune.tune([KEY], OWNER, lambda _, config: times.get(config, 20.0), lambda _: CONFIG)
    assert tables.load(OWNER) == {KEY: best if kept else CONFIG}
    (result,) = tuned.results
    assert (result.heuristic, result.time) == (10.0, best_time if kept else 10.0)
    assert tuned.summary(63.2) == "1 of 1 keys in 63 s, " + (
        "1 faster than the heuristic (median 1.11x)" if kept else "0 faster than the heuristic"
    )


def test_the_fastest_are_measured_again_in_turns_with_the_heuristic() -> None:
    """One lucky sample decides nothing: the medians of the last rounds do."""
    lucky, steady = [config for config in tune.candidates(KEY) if config != CONFIG][:2]
    series = {lucky: [1.0, 30.0, 30.0, 2.0], steady: [9.0, 8.0, 8.0, 30.0], CONFIG: [10.0, 10.0, 10.0, 10.0]}
    order: list[RowConfig] = []

    def measure(_: Key, config: RowConfig) -> float:
        order.append(config)
        return series[config].pop(0) if config in series else 20.0

    tuned = tune.tune([KEY], OWNER, measure, lambda _: CONFIG)
    assert tuned.entries == {KEY: (steady, 8.0)}
    assert order[-9:] == [CONFIG, lucky, steady] * tune.ROUNDS


def test_where_the_heuristic_fails_the_fastest_candidate_is_kept() -> None:
    def heuristic(_: Key) -> RowConfig:
        raise RuntimeError("does not compile")

    tuned = tune.tune([KEY], OWNER, lambda _, config: float(config.num_warps), heuristic)
    assert tuned.results[0].heuristic is None
    assert tuned.entries[KEY][0].num_warps == 1


def test_at_the_deadline_finished_keys_are_saved_and_the_unfinished_dropped() -> None:
    measured: list[Key] = []

    def measure(key: Key, config: RowConfig) -> float:
        measured.append(key)
        return float(config.num_warps)

    tuned = tune.tune([KEY, BACKWARD], OWNER, measure, over=lambda: measured.count(BACKWARD) > 2)
    assert set(tables.load(OWNER)) == {KEY}
    assert tuned.summary(5.0) == "1 of 2 keys in 5 s, 0 faster than the heuristic; stopped: the time was over"


def test_after_a_lost_context_nothing_more_is_measured() -> None:
    measured: list[Key] = []

    def measure(key: Key, config: RowConfig) -> float:
        measured.append(key)
        if key == BACKWARD:
            raise tune.ContextLostError("an illegal memory access was encountered")
        return float(config.num_warps)

    tuned = tune.tune([KEY, BACKWARD, Key("softmax_bwd", 64, 512, 4)], OWNER, measure)
    assert set(tables.load(OWNER)) == {KEY}
    assert measured.count(BACKWARD) == 1
    assert measured[-1] == BACKWARD
    assert tuned.lost
    assert "lost at layer_norm_bwd 64x512: an illegal memory access" in tuned.summary(5.0)


def test_an_error_after_which_the_gpu_answers_no_more_is_a_lost_context(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = tune_measure.Measure()

    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(tune_measure, "arguments", lambda *_: (_ for _ in ()).throw(RuntimeError("first")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="first"):
        measure(KEY, CONFIG)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    for call in (lambda: measure(KEY, CONFIG), lambda: measure.heuristic(KEY)):
        with pytest.raises(tune.ContextLostError, match=r"^CUDA error: an illegal memory access was encountered$"):
            call()


def test_the_most_valuable_keys_come_first() -> None:
    keys = tune_measure.all_keys()
    headline = tune_measure.headline_shapes()
    first = [(key.kernel[:-4], key.M, key.N) for key in keys[: 2 * len(headline)]]
    assert first[::2] == first[1::2] == headline, "each is a benchmark shape, forward then backward"
    assert headline[:4] == [
        ("softmax", 4096, 4096), ("softmax", 262144, 512), ("softmax", 8192, 50257), ("layer_norm", 8192, 4096)
    ]  # fmt: skip
    assert {key.itemsize for key in keys[: len(keys) // 2]} == {2}
    assert len(keys) == len(set(keys))


def test_every_key_has_a_heuristic_configuration_that_a_table_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tuning compares with, on fake tensors of an H100."""
    keys = tune_measure.select(tune_measure.all_keys(), tune_measure.BY_ITEMSIZE, ["headline"])
    clusters = has_clusters(H100.capability, triton_version()[1])
    with launches.listed(H100, dispatched=True):
        tables._tables[0] = dict.fromkeys(keys, CONFIG)
        for key in keys:
            chosen = tune_measure.chosen(key, tune_measure.arguments(key, launches.DEVICE))
            tables.check_config(key, chosen, clusters)
        assert tables._tables[0] == dict.fromkeys(keys, CONFIG), "the table is as it was"
    assert 0 not in tables._tables


def test_what_tuning_compiles_beforehand_is_every_candidate() -> None:
    for key in (Key("softmax_fwd", 4096, 32768, 2), Key("layer_norm_bwd", 8192, 4096, 2)):
        (call,) = tune_measure.candidate_calls([key], tune_measure.BY_ITEMSIZE, False)
        ((found, error),) = precompile.launches_of([call], H100)
        assert error == ""
        rows = [dict(launch.options) for launch in found if launch.kernel.startswith(key.kernel)]
        seen = {(o.get("BLOCK_M", 1), o["BLOCK_N"], o["num_warps"]) for o in rows}
        assert {(c.block_m, c.block_n, c.num_warps) for c in tune.candidates(key)} <= seen
        assert len(rows) <= len(tune.candidates(key)) + 1, "the check runs the kernels that are timed"


def test_keys_are_selected_by_pattern_and_in_their_order() -> None:
    keys, dtypes = tune_measure.all_keys(), tune_measure.BY_ITEMSIZE
    assert tune_measure.select(keys, dtypes, []) == keys
    softmax = tune_measure.select(keys, dtypes, ["^softmax_.*bf16$,layer_norm_fwd-8192x4096-bf16"])
    assert softmax == [
        k for k in keys if k.itemsize == 2 and (k.kernel.startswith("softmax") or k == Key("layer_norm_fwd", 8192, 4096, 2))
    ]
    headline = tune_measure.select(keys, dtypes, ["headline"])
    assert len(headline) == 4 * len(tune_measure.headline_shapes())
    for wrong in ("nothing", "(", ""):
        with pytest.raises(ValueError, match="allowed"):
            tune_measure.select(keys, dtypes, [wrong])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dtype", "int8"], ("--dtype", "'int8'")), (["--dtype", "bf16,fp16"], ("--dtype", "share the table")),
        (["--keys", "nothing"], ("--keys", "'nothing'")), (["--keys", "("], ("--keys", "regular expression")),
        (["--seconds", "0"], ("--seconds", "more than 0")), (["--kernel", "gelu"], ("--kernel", "'gelu'")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_argument_is_named(options: list[str], named: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["tune", *options], env={"COLUMNS": "500", "TERM": "dumb"})
    assert result.exit_code == 2
    for part in named:
        assert part in result.output


class FakeMeasure:
    """Every warp more is faster; the heuristic takes 4; the GPU is lost at the given measurement."""

    lost_after = 10**9

    def __init__(self, _: dict[int, torch.dtype]) -> None:
        self.count = 0

    def __call__(self, key: Key, config: RowConfig) -> float:
        self.count += 1
        if self.count > self.lost_after:
            raise tune.ContextLostError("unspecified launch failure")
        return 64.0 / config.num_warps + config.block_m

    def heuristic(self, key: Key) -> RowConfig:
        return next(config for config in tune.candidates(key) if config.num_warps == 4)


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A GPU for the command line, whose times are made up; returns the precompilations."""
    compiled: list[tuple[Any, ...]] = []

    def precompiled(*args: Any, **kwargs: Any) -> precompile.Outcome:
        compiled.append((args, kwargs))
        return precompile.Outcome(compiled=3, processes=16)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Gpu, "current", lambda: H100)
    monkeypatch.setattr(tables, "machine", lambda _: OWNER)
    monkeypatch.setattr(precompile, "precompile", precompiled)
    monkeypatch.setattr(tune_measure, "Measure", FakeMeasure)
    return compiled


def test_the_command_precompiles_then_measures_and_says_what_came_of_it(made_up_gpu: list[tuple[Any, ...]]) -> None:
    options = ["tune", "--dtype", "bf16", "--keys", "softmax_(fwd|bwd)-4096x4096-", "--seconds", "1000"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "precompile: 3 kernels (0 already there), 0 failed, 16 processes, 0.0 s" in lines
    assert re.fullmatch(r"tune: 2 of 2 keys in \d+ s, 2 faster than the heuristic \(median \d\.\d\dx\)", lines[-1])
    assert set(tables.load(OWNER)) == {Key("softmax_fwd", 4096, 4096, 2), Key("softmax_bwd", 4096, 4096, 2)}
    ((calls, gpu), limits), = made_up_gpu  # fmt: skip
    assert ([call.name for call in calls], gpu) == (["softmax_fwd-4096x4096-bf16", "softmax_bwd-4096x4096-bf16"], H100)
    assert limits == {"seconds": 350.0, "longest_first": False}
    again = CliRunner().invoke(app, options)
    assert again.output.splitlines()[-1].startswith("tune: 0 of 0 keys in ")
    assert len(made_up_gpu) == 1, "there is nothing to compile for"


def test_no_time_at_all_is_said(made_up_gpu: list[tuple[Any, ...]]) -> None:
    result = CliRunner().invoke(app, ["tune", "--dtype", "fp16", "--keys", "headline", "--seconds", "1e-9"])
    assert (result.exit_code, len(made_up_gpu)) == (0, 1)
    last, asked = (
        result.output.splitlines()[-1],
        len(tune_measure.select(tune_measure.all_keys([2]), tune_measure.BY_ITEMSIZE, ["headline"])),
    )
    assert last.endswith(f"0 of {asked} keys in 0 s, 0 faster than the heuristic; stopped: the time was over")
    assert asked > 20
