"""fused-ops doctor, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from fused_ops import REGISTRY
from fused_ops._runtime import settings
from fused_ops.export.cli import app
from fused_ops.export.cli import doctor as command
from fused_ops.ops.linear.dispatch import RULES
from tests import process


def doctor(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_OPS_BACKEND")}
    return process.run(process.command("doctor", *options), env=base | env)


def test_json_holds_everything() -> None:
    done = doctor("--json", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {
        "python", "packages", "gpu", "settings", "refused", "unknown", "launches", "ops", "libraries", "exports", "caches", "problems"
    }  # fmt: skip
    assert found["launches"] == {"way": "interpreter", "reason": "TRITON_INTERPRET is set"}
    assert found["packages"]["torch"] == version("torch")
    assert {o["op"] for o in found["ops"]} >= {spec.public.__name__ for spec in REGISTRY.values()}
    if not torch.cuda.is_available():
        assert not found["gpu"]["available"]
        assert all(o["backend"] == "interpreter" and "TRITON_INTERPRET" in o["reason"] for o in found["ops"])
    assert [rule["why"] for rule in found["libraries"]] == [rule.reason for rule in RULES]
    assert {c["cache"] for c in found["caches"]} >= {"triton", "inductor"}
    targets = {e["target"]: e for e in found["exports"]}
    assert set(targets) >= {"onnx", "tensorrt", "torchscript", "aoti"}
    for target in targets.values():
        assert target["available"] == (not target["missing"])
        assert bool(target["install"]) == (not target["available"])


@pytest.mark.parametrize(("value", "way"), [("auto", "fast path"), ("triton", "kernel[grid]")])
def test_the_way_of_launches_is_told(value: str, way: str) -> None:
    pytest.importorskip("triton")
    found = json.loads(doctor("--json", FUSED_OPS_LAUNCH=value).stdout)
    assert found["settings"]["FUSED_OPS_LAUNCH"] == value
    assert found["launches"]["way"] == way
    assert "FUSED_OPS_LAUNCH=triton" in found["launches"]["reason"]


def test_text_names_backends_reasons_and_what_to_install() -> None:
    done = doctor()
    assert done.returncode == 0, done.stderr
    for word in ("Installation", "Ops", "Export targets", "Caches", version("torch"), "fused_softmax", "no problems"):
        assert word in done.stdout
    if not torch.cuda.is_available():
        assert "CPU tensors run ATen" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, FUSED_OPS_BACKEND=triton is possible")
def test_what_cannot_run_is_a_problem() -> None:
    done = doctor(FUSED_OPS_BACKEND="triton")
    assert done.returncode == 1
    assert "problem: fused_softmax: FUSED_OPS_BACKEND=triton, but the tensors are on the CPU" in done.stdout


def test_a_refused_variable_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REFUSED", [settings.Refusal("FUSED_OPS_CLUSTER", "[maybe]", "'1', '0'")])
    monkeypatch.setenv("FUSED_OPS_BACKNED", "aten")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert re.search(r"FUSED_OPS_CLUSTER +'\[maybe\]' +'1', '0'", done.output)
    assert re.search(r"FUSED_OPS_BACKNED +FUSED_OPS_BACKEND", done.output)
    assert "problem: FUSED_OPS_CLUSTER: got '[maybe]', allowed: '1', '0'" in done.output
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["refused"] == [{"variable": "FUSED_OPS_CLUSTER", "got": "[maybe]", "allowed": "'1', '0'"}]
    assert found["unknown"] == [{"variable": "FUSED_OPS_BACKNED", "nearest": "FUSED_OPS_BACKEND"}]
    assert len(found["problems"]) == 1


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_ops._tools import doctor as doctor_module

    monkeypatch.setattr(doctor_module, "find_spec", lambda name: None if name in ("onnx", "tensorrt") else object())
    rows = {row["target"]: row for row in doctor_module._exports()}
    assert rows["tensorrt"]["missing"] == ["onnx", "tensorrt"]
    assert rows["tensorrt"]["install"] == "pip install 'fused-ops[tensorrt]'"
    assert rows["torchscript"]["available"]


def test_problems_of_a_gpu() -> None:
    gpu = {"available": True, "devices": [{"name": "Old", "capability": "7.5", "supported": False}]}
    found = {"refused": [], "ops": [], "gpu": gpu, "packages": {"triton": None}}
    problems = command._problems(found)
    assert len(problems) == 2
    assert "pip install triton" in problems[0]
    assert "Old: compute capability 7.5, the kernels need 8.0" in problems[1]
