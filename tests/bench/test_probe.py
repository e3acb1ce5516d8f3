"""The first look at a GPU, on the fake CUDA layer: each check holds, and one that fails stops no other."""

from __future__ import annotations

import pytest

from bench import probe
from fused_ops import REGISTRY
from tests.bench import fake_cuda


def test_every_check_holds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probe, "_host_us", lambda call: 1.0)
    for name, size in (("M", 8), ("K", 64), ("N", 32)):  # a CPU's
        monkeypatch.setattr(probe, name, size)
    with fake_cuda.installed():
        status = probe.main()
        count = len(probe.checks())
    said = capsys.readouterr().out.splitlines()
    assert status == 0, said
    assert said[-1] == f"probe: {count} of {count} hold"
    assert all(any(line.startswith(f"{name}: ") for line in said) for name in REGISTRY)


def test_a_check_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise RuntimeError("no\nsecond line")

    monkeypatch.setattr(probe, "checks", lambda: [("first", broken), ("second", lambda: "fine")])
    with fake_cuda.installed():
        assert probe.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert "second: fine" in said
    assert said[-1] == "probe: 1 of 2 hold; first: RuntimeError: no"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probe.torch.cuda, "is_available", lambda: False)
    assert probe.main() == 2
    assert capsys.readouterr().out == "bench.probe: needs a CUDA device\n"
