"""explain() names what a call runs, and agrees with what runs; fallbacks warn once."""

from __future__ import annotations

import json
import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_ops
from fused_ops import compile_with_aten, explain, fused_layernorm, fused_linear, fused_softmax
from fused_ops._runtime import backend as backend_module
from fused_ops._runtime import settings
from fused_ops._tools import explain as explain_module
from fused_ops._tools.forecast import GPUS, forecast
from tests import process

INTERPRETED = """
import json, torch
import fused_ops
from fused_ops import explain, fused_layernorm, fused_linear, fused_softmax
x, w, b, W = torch.randn(37, 100), torch.randn(100), torch.randn(100), torch.randn(48, 100)
calls = [(fused_layernorm, (x, (100,), w, b)), (fused_softmax, (x, 0)), (fused_linear, (x, W, None, "gelu"))]
found = [explain(f, *a).as_json() for f, a in calls]
double = explain(fused_softmax, x.double())
from fused_ops.testing import recorded
ran = []
for f, a in calls:
    with recorded() as launches:
        f(*a)
    ran.append([k.fn.__name__ for k, _, _ in launches])
before = x.clone()
explain("linear", x.requires_grad_(), W, None, "gelu")
assert torch.equal(before, x)
print(json.dumps({"found": found, "ran": ran, "double": double.as_json()}))
"""


def in_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_OPS_BACKEND")}
    return process.run(code, env=base | env)


def test_on_the_cpu_it_is_aten() -> None:
    x = torch.randn(4, 6, 8)
    w, b = torch.randn(8), torch.randn(8)
    found = explain(fused_layernorm, x, (8,), w, b)
    assert (found.op, found.backend, found.reason) == ("layer_norm", "aten", "CPU tensors run ATen")
    assert found.shapes == ((4, 6, 8), (8,), (8,))
    statistics = 2 * 4 * 6 * 4
    assert found.bytes == 4 * (2 * x.numel() + 16) + statistics
    assert (found.steps, found.flops, found.seconds) == ((), 0, None)
    text = str(found)
    assert "layer_norm: (4, 6, 8) (8,) (8,) float32 on cpu" in text
    assert "no time is predicted" in text


def test_flops_and_training_bytes_of_a_linear() -> None:
    x, w, b = torch.randn(4, 6, 8), torch.randn(5, 8), torch.randn(5)
    inference = explain(fused_linear, x, w, b, "gelu")
    training = explain("linear", x.requires_grad_(), w, b, activation="gelu")
    assert inference.flops == training.flops == 2 * 24 * 5 * 8
    assert training.bytes - inference.bytes == 24 * 5 * 4  # the pre-activation


def test_names_and_refusals() -> None:
    x = torch.randn(3, 4)
    assert explain(fused_softmax, x) == explain("softmax", x) == explain("fused_softmax", x)
    with pytest.raises(ValueError, match=r"explain: op: got 'gelu', allowed: .*fused_softmax"):
        explain("gelu", x)
    with pytest.raises(RuntimeError, match="fused_layernorm: normalized_shape"):
        explain(fused_layernorm, x, (5,))
    assert "explain" in fused_ops.__all__
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = fused_ops.explian


def test_transforms_and_the_compile_switch_are_told() -> None:
    x = torch.randn(3, 4)
    seen: list[Any] = []
    torch.func.vmap(lambda row: (seen.append(explain(fused_softmax, row)), row)[1])(x)
    assert seen[0].backend == "aten"
    assert "torch.func" in seen[0].reason
    compile_with_aten("softmax")
    try:
        assert explain(fused_softmax, x).notes[0] == "under torch.compile: ATen (compile_with_aten)"
        compile_with_aten("softmax", enabled=False)
        assert explain(fused_softmax, x).notes[0] == "under torch.compile: our operator (compile_with_aten)"
    finally:
        compile_with_aten("softmax", enabled=None)
    assert "explain_compiled" in explain(fused_softmax, x).notes[0]


def test_kernels_are_those_that_launch() -> None:
    """In the interpreter: explain's kernels, and the launches of the call itself."""
    done = in_process(INTERPRETED, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for found, ran in zip(result["found"], result["ran"]):
        assert found["backend"] == "interpreter"
        assert [name for name, _, _ in found["steps"]] == ran
        assert ran
        for _, grid, config in found["steps"]:
            assert grid >= 1
            assert any(key.startswith("BLOCK") for key in config)
    assert result["double"]["backend"] == "aten"
    assert result["double"]["reason"].startswith("no kernel for float64")


def test_the_way_of_launches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose kernels are compiled; where nothing is, there is no way to tell."""
    x = torch.randn(3, 4)
    assert explain(fused_softmax, x).launches == ""
    monkeypatch.setattr(explain_module, "chosen", lambda _: ("triton", "CUDA tensors run the Triton kernels"))
    for path in (("fast path", "known for Triton 3.6.0"), ("kernel[grid]", "FUSED_OPS_LAUNCH=triton")):
        monkeypatch.setattr(explain_module, "launch_path", lambda path=path: path)
        found = explain(fused_softmax, x)
        assert found.as_json()["launches"] == ": ".join(path)
        assert f"\n  launched  by {path[0]}: {path[1]}\n" in str(found)


def test_limits_come_from_the_data_sheets_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 SXM by its clocks: 3.35 TB/s, 989 TFLOP/s bf16, 495 TF32 and 67 fp32, as its data sheet says."""
    h100 = SimpleNamespace(
        name="H100", major=9, minor=0, multi_processor_count=132, clock_rate=1_830_000, memory_clock_rate=2_619_000,
        memory_bus_width=5120,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    half = explain_module.limit_of(torch.empty(1, dtype=torch.bfloat16))
    assert half is not None
    assert half.bytes_per_s == pytest.approx(3.35e12, rel=0.01)
    assert half.flops_per_s == pytest.approx(989e12, rel=0.01)
    assert explain_module.limit_of(torch.empty(1)).flops_per_s == pytest.approx(67e12, rel=0.1)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert explain_module.limit_of(torch.empty(1)).flops_per_s == pytest.approx(495e12, rel=0.01)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    del h100.memory_clock_rate
    assert explain_module.limit_of(torch.empty(1)) is None


def test_a_fallback_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    backend_module.warn_once.cache_clear()
    for _ in range(3):
        backend_module.warn_once("layer_norm", backend_module.NO_FP64)
    backend_module.warn_once("softmax", backend_module.NO_FP64)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("fused_ops: layer_norm: there is no float64 kernel; ATen runs instead")


def test_float64_kernels_fall_back_and_warn_once() -> None:
    code = (
        "import torch, fused_ops\n"
        "x = torch.randn(3, 4, dtype=torch.float64)\n"
        "for _ in range(2):\n"
        "    fused_ops.fused_layernorm(x, (4,)); fused_ops.fused_softmax(x); fused_ops.fused_linear(x, x)\n"
    )
    done = in_process(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    for op in ("layer_norm", "softmax", "linear"):
        assert done.stderr.count(f"fused_ops: {op}: there is no float64 kernel; ATen runs instead") == 1


@pytest.mark.parametrize(
    ("backend", "interpret", "triton", "device", "expected"),
    [
        ("auto", False, True, "cuda", "triton"),
        ("auto", False, False, "cuda", "aten"),
        ("triton", False, False, "cuda", "refused"),
        ("aten", True, True, "cuda", "aten"),
        ("auto", False, True, "cpu", "aten"),
        ("auto", True, True, "cpu", "interpreter"),
        ("triton", False, True, "cpu", "refused"),
        ("auto", False, True, "xpu", "aten"),
    ],
)
def test_the_choice_of_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    backend: str, interpret: bool, triton: bool, device: str, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(settings, "BACKEND", backend)
    monkeypatch.setattr(settings, "INTERPRET", interpret)
    monkeypatch.setattr(backend_module, "TRITON_INSTALLED", triton)
    backend_module.warn_once.cache_clear()
    assert backend_module.chosen(device)[0] == expected
    run = backend_module.implementation("op", lambda: "reference", lambda: "launch", device)
    if expected == "refused":
        with pytest.raises(RuntimeError, match="FUSED_OPS_BACKEND=triton"):
            run()
    else:
        assert run() == ("launch" if expected in ("triton", "interpreter") else "reference")
    said = any("Triton is not installed" in record.getMessage() for record in caplog.records)
    assert said == (device == "cuda" and backend == "auto" and not triton)


def test_a_forecast_is_given_where_there_is_a_model() -> None:
    """Of the same call by the forecast itself; none for another GPU, another dimension, nothing to compute, another op."""
    x, w = torch.empty(4, 1024, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(1000, 4096, device="meta")
    half: dict[str, Any] = {"itemsize": 2, "gpu": GPUS["h100"]}
    for op, raw, expected in (
        ("softmax", (x, 1, None), forecast("softmax", (4096, 4096), pass_="fwd", **half)),
        ("layer_norm", (x, None, None, 1e-5), forecast("layer_norm", (4096, 4096), pass_="fwd", **half)),
        ("linear", (x, w, None, "gelu", False), forecast("linear", (4096, 1000, 4096), pass_="fwd", activation="gelu", **half)),
        (
            "linear",
            (x, w, None, "silu", True),
            forecast("linear", (4096, 1000, 4096), pass_="train_fwd", activation="silu", **half),
        ),
    ):
        assert explain_module.forecast_of(op, raw, "NVIDIA H100 80GB HBM3") == (expected.seconds, expected.binding)
        assert explain_module.forecast_of(op, raw, "NVIDIA Unheard-of") is None
    assert explain_module.forecast_of("softmax", (x, 1024, None), "h100") is None
    assert explain_module.forecast_of("softmax", (x[:0], 1, None), "h100") is None
    assert explain_module.forecast_of("mlp", (x,), "h100") is None
