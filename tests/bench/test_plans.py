"""The plans of bench/gpu.sh under a simulated clock: they fit their budget, and a cut or a crash leaves what was measured."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import gpu
from bench.failure import CONTEXT_LOST
from bench.gpu import Run, arguments
from bench.headline import SWEEPS, headline_tasks, sweep
from bench.plans import CLOSE_S, PLANS, Step
from bench.providers import PROVIDERS
from fused_ops import REGISTRY

LEASE_S = 900  # what a borrowed GPU is there for in all
OVERHEAD_S = 120  # its start and both transfers of a run


class Simulated:
    """A clock that a step moves by what it takes; took: (name, seconds) of each step that was begun."""

    def __init__(self, seconds: Callable[[str, float], float], status: Callable[[str], int] = lambda name: 0) -> None:
        self.now, self.seconds, self.status = 1000.0, seconds, status
        self.took: list[tuple[str, float]] = []
        self.commands: list[list[str]] = []

    def execute(self, command: list[str], limit: float, log: Path, name: str, environment: dict[str, str]) -> tuple[int, str]:
        seconds = min(self.seconds(name, limit), limit)
        self.now += seconds
        self.took.append((name, seconds))
        self.commands.append(command)
        return (124 if seconds == limit else self.status(name)), f"{name} said this"


def simulate(out: Path, simulated: Simulated, monkeypatch: pytest.MonkeyPatch, *options: str) -> Run:
    """A run of a plan in which nothing needed is missing."""
    out.mkdir(exist_ok=True)
    monkeypatch.setattr(Run, "why_not", lambda self, step: "")
    run = Run(arguments([str(out), *options]), lambda: simulated.now, simulated.execute)
    run.all()
    return run


def whole(name: str, limit: float) -> float:
    return limit


@pytest.mark.parametrize("call", PLANS)
def test_a_plan_fits_when_each_step_takes_its_limit(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Simulated(whole)
    simulate(tmp_path, simulated, monkeypatch, "--call", call)
    assert [name for name, _ in simulated.took] == [s.name for s in PLANS[call].steps], "no step starves another"
    assert simulated.now - 1000 <= PLANS[call].seconds - CLOSE_S
    assert all(seconds > s.least_s for s, (_, seconds) in zip(PLANS[call].steps, simulated.took))


def test_the_first_two_calls_fit_a_lease() -> None:
    """With a start of its own for each, and with one for both."""
    first, second = PLANS["first"].seconds, PLANS["second"].seconds
    assert first <= 300
    assert OVERHEAD_S + first + second <= LEASE_S
    assert LEASE_S - OVERHEAD_S - first >= second + OVERHEAD_S / 2  # even when the machine was given back in between


@pytest.mark.parametrize("call", PLANS)
@pytest.mark.parametrize("seconds", [30, 90, 200, 350, 2000])
def test_any_budget_is_kept(call: str, seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Simulated(whole)
    run = simulate(tmp_path, simulated, monkeypatch, "--call", call, "--seconds", str(seconds))
    assert simulated.now - 1000 <= seconds - CLOSE_S + 1e-6
    kept = [s.name for s in PLANS[call].steps if s.kept]
    assert all(name in dict(simulated.took) for name in kept), "what is kept back runs, however little there is"
    assert [d["name"] for d in run.done] == [s.name for s in PLANS[call].steps]
    assert json.loads((tmp_path / "machine.json").read_text())["steps"] == [
        {**d, "seconds": round(d["seconds"], 2)} for d in run.done
    ]


def test_what_early_steps_save_goes_to_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Simulated(lambda name, limit: 5.0 if name in ("wheels", "probe", "precompile", "correctness") else limit)
    simulate(tmp_path, quick, monkeypatch, "--call", "first")
    steps = {s.name: s for s in PLANS["first"].steps}
    saved = sum(steps[name].limit_s - 5 for name in ("wheels", "probe", "precompile", "correctness"))
    assert dict(quick.took)["headline"] == pytest.approx(
        steps["headline"].limit_s + saved + 300 - CLOSE_S - sum(s.limit_s for s in steps.values())
    )


@pytest.mark.parametrize("call", PLANS)
def test_a_failed_step_stops_no_other(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in PLANS[call].steps:
        simulated = Simulated(lambda *_: 9.0, lambda name, broken=broken: int(name == broken.name))
        run = simulate(tmp_path / broken.name, simulated, monkeypatch, "--call", call)
        assert [name for name, _ in simulated.took] == [s.name for s in PLANS[call].steps]
        assert run.failed
        (failed,) = [d for d in run.done if d["status"] == "failed"]
        assert failed["name"] == broken.name
        assert f"{broken.name} said this" in (tmp_path / broken.name / "summary.md").read_text()


def test_a_lost_context_is_resumed_after_the_measurement_that_lost_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (s for plan in PLANS.values() for s in plan.steps if s.measures):
        lost: list[str] = []

        def status(name: str, step: Step = step, lost: list[str] = lost) -> int:
            if name == step.name and not lost:
                lost.append(name)
                return CONTEXT_LOST
            return 0

        call = next(c for c, plan in PLANS.items() if step in plan.steps)
        simulated = Simulated(lambda *_: 9.0, status)
        run = simulate(tmp_path, simulated, monkeypatch, "--call", call)
        assert not run.failed
        first, second = (c for c, (name, _) in zip(simulated.commands, simulated.took) if name == step.name)
        assert "--bench-after-crash" in second
        assert "--bench-after-crash" not in first


def test_a_resumed_run_leaves_out_what_ended_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [s.name for s in PLANS["first"].steps]
    broken = Simulated(lambda *_: 9.0, lambda name: int(name == "roofline"))
    simulate(tmp_path, broken, monkeypatch)
    again = Simulated(lambda *_: 9.0)
    run = simulate(tmp_path, again, monkeypatch, "--resume")
    assert [name for name, _ in again.took] == ["roofline"]
    assert sorted(d["name"] for d in run.done) == sorted(names)


def test_at_most_eight_files_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = simulate(tmp_path, Simulated(lambda *_: 9.0), monkeypatch, "--call", "second")
    (run.parts / "tables").mkdir()
    (run.parts / "tables" / "t.json").write_text("{}")
    for name in ("results.csv", "correctness.csv", "log.txt"):
        (tmp_path / name).touch()
    run.drift = lambda: ""  # type: ignore[method-assign]
    run.write()
    assert len(os.listdir(tmp_path)) <= 8
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_commands_name_files_that_exist() -> None:
    for plan in PLANS.values():
        for step in plan.steps:
            for word in step.command:
                if word.startswith(("bench/", "tests/")):
                    assert (gpu.ROOT / word).exists(), f"{step.name}: {word}"
                if word.startswith("bench."):
                    assert (gpu.ROOT / f"{word.replace('.', '/')}.py").exists(), f"{step.name}: {word}"


def test_headline_rows_are_cases_of_their_ops() -> None:
    tasks = headline_tasks()
    assert len(tasks) == sum(len(row.cases) * len(row.passes) for op in REGISTRY.values() for row in op.bench.headline)
    assert len({t.id for t in tasks}) == len(tasks), "a row is said twice"


def test_sweeps_name_providers_and_each_once() -> None:
    names = [name for providers in SWEEPS.values() for name in providers]
    assert sorted(names) == sorted(p.name for p in PROVIDERS)


def test_a_sweep_measures_a_row_by_everybody_before_the_next() -> None:
    pairs = sweep([1], SWEEPS[1])
    assert len(pairs) == len(SWEEPS[1]) * len(headline_tasks())
    blocks = [task.id for task, _ in pairs]
    assert all(a == b or blocks.index(b) == i + 1 for i, (a, b) in enumerate(pairwise(blocks)))
    assert sweep([2], ["eager"]) == []
    both: list[Any] = sweep([1, 2], ["compile", "ours"])
    assert [name for _, name in both] == ["ours"] * len(headline_tasks()) + ["compile"] * len(headline_tasks())


def test_a_run_leaves_nothing_but_what_is_under_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    run = simulate(tmp_path / "out", Simulated(whole), monkeypatch)
    assert run.parts.parent == temporary
    del run
    gc.collect()
    assert list(temporary.iterdir()) == []
