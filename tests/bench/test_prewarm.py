"""Prewarming: every headline row is compiled once, a second process finds it in the cache, and the last line tells."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import prewarm
from bench.headline import headline_tasks
from bench.provider import Provider, Unsupported
from tests.bench.small import task

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json
from bench.prewarm import prewarm
from tests.bench.small import task
pairs = [(task("softmax"), "compile"), (task("layer_norm", "fwd+bwd"), "compile")]
print(json.dumps(list(prewarm(pairs, "cpu"))))
"""


def test_every_headline_row_of_compile_is_made_once() -> None:
    made = [(t.spec.name, t.case.name, t.pass_) for t, p in prewarm.rows(["compile"]) if p == "compile"]
    assert len(set(made)) == len(made)
    assert {p for _, _, p in made} == {"fwd", "fwd+bwd"}, "what compiles the same is made once"
    wanted = {(t.spec.name, t.case.name, "fwd" if t.pass_ == "fwd" else "fwd+bwd") for t in headline_tasks()}
    assert set(made) == wanted


def test_the_peers_come_after_compile_and_keep_their_passes() -> None:
    pairs = prewarm.rows(["compile", "liger"])
    names = [p for _, p in pairs]
    assert names == sorted(names, key=["compile", "liger"].index)
    assert {t.pass_ for t, p in pairs if p == "liger"} >= {"fwd", "bwd"}
    assert prewarm.rows(["compile"], only="softmax-4k-bf16-fwd") != []
    assert prewarm.rows(["compile"], only="nothing") == []


class Fake(Provider):
    name = "fake"

    def __init__(self, error: Exception | None, absent: str = "") -> None:
        self.error, self.absent = error, absent

    def available(self, device: str) -> str:
        return self.absent

    def prepare(self, work: Any) -> Any:
        raise self.error or AssertionError("not asked")


@pytest.mark.parametrize(
    ("provider", "outcome", "error"),
    [
        (Fake(RuntimeError("no\nmore")), "failed", "RuntimeError: no"),
        (Fake(Unsupported("not this")), "unsupported", "not this"),
        (Fake(None, "is not installed"), "unsupported", "is not installed"),
    ],
)
def test_what_fails_is_told_and_stops_nothing(
    provider: Fake, outcome: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prewarm, "_keep_no_choices", lambda: None)
    monkeypatch.setattr(prewarm, "by_name", lambda name: provider)
    said = list(prewarm.prewarm([(task("softmax"), "fake"), (task("layer_norm"), "fake")], "cpu"))
    assert [(s["outcome"], s["error"]) for s in said] == [(outcome, error)] * 2


def test_after_the_deadline_nothing_is_begun() -> None:
    assert list(prewarm.prewarm([(task("softmax"), "compile")], "cpu", deadline=0.0)) == []


def said(outcome: str, error: str = "", hits: int = 0) -> dict[str, Any]:
    return {"id": "row", "outcome": outcome, "error": error, "hits": hits, "misses": 1}


@pytest.mark.parametrize(
    ("outcomes", "died", "status", "line"),
    [
        ([said("made", hits=2), said("failed", "E: x")], [], 0, "1 of 3 made (2 graphs were cached, 2 compiled), 0 unsupported, 1 failed, 1 not"),
        ([said("failed", "E: x")], [], 1, "first: row: E: x"),
        ([said("made")], ["killed"], 1, "first: a process died: killed"),
        ([], [], 0, "0 of 3 made"),
    ],
)  # fmt: skip
def test_the_last_line(
    outcomes: list[dict[str, Any]], died: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prewarm.tell(outcomes, 3, died, 2, 1.5) == status
    assert line in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert prewarm.main([]) == 2
    assert capsys.readouterr().out == "prewarm: needs a CUDA device\n"


def test_processes_that_do_not_end_are_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At the deadline; what they had said by then counts."""
    line = '{"id": "a", "outcome": "made", "error": "", "hits": 0, "misses": 1}'
    child = [
        sys.executable,
        "-c",
        f"import time; print('{line}', flush=True); print('cut sho', end='', flush=True); time.sleep(600)",
    ]
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: real(child, **kwargs))
    arguments = argparse.Namespace(providers="compile", only="softmax-(4k|8k)", processes=2, seconds=5.0, device="cpu")
    assert prewarm.run(arguments) == 0
    assert "prewarm: 2 of 4 made" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    import json

    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, env=environment).stdout)
        for _ in range(2)
    ]  # fmt: skip
    first, second = (([s["outcome"] for s in r], sum(s["hits"] for s in r), sum(s["misses"] for s in r)) for r in runs)
    assert first[0] == second[0] == ["made", "made"]
    assert (first[1], second[2]) == (0, 0)
    assert first[2] == second[1] == 3  # softmax, and layer norm's forward and backward
    assert not list(tmp_path.rglob("*.best_config")), "no choice between configurations is kept"
