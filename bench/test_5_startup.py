"""What is paid once: importing, compiling, exporting, building an engine. Needs no GPU; each sample is a fresh start.

Subprocesses are timed by the CPU time they use, which other processes on the machine do not lengthen; exports and builds
in this process likewise.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_ops._tools.audit_cases import audit_cases

from .environment import ROOT
from .headline import headline_ops
from .models import MODELS
from .provider import missing
from .record import Recorder, spread
from .timing import DeviceClock

CLOCK = DeviceClock()
IMPORTS = {"torch": "import torch", "ours": "import torch; import fused_ops"}
COMPILE = """
import torch, torch.nn.functional as F
import fused_ops
device = {device!r}
x, w, b = torch.randn(64, 256, device=device), torch.randn(256, device=device), torch.randn(256, device=device)
f = (lambda x, w, b: {call} * 2)
torch.compile(f, fullgraph=True)(x, w, b)
"""
CALLS = {"eager": "F.layer_norm(x, (256,), w, b)", "ours": "fused_ops.fused_layernorm(x, (256,), w, b)"}
KERNEL = """
import fused_ops
from fused_ops.kernels import aot
aot.compiled_case({case!r})
"""


def _cpu_seconds(code: str, cache: Path) -> float:
    """CPU seconds, children included, that a fresh Python takes for code with empty Inductor and Triton caches."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, **caches, "PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr[-2000:]
    return after.children_user + after.children_system - before.children_user - before.children_system


def _report(benchmark: Any, recorder: Recorder, samples: list[float], case: str, provider: str, said: str) -> None:
    remaining = iter(samples)
    benchmark.group = f"startup-{case}"
    benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(samples))
    recorder.add(
        op="startup", case=case, dtype="fp32", kind="startup", provider=provider, shape="1", configuration=said, status="ok",
        role="ours" if provider == "ours" else "peer", method="cpu time", **{"pass": "fwd"}, **spread(samples),
    )  # fmt: skip


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("what", IMPORTS)
def test_import(what: str, benchmark: Any, recorder: Recorder, tmp_path: Path) -> None:
    samples = [_cpu_seconds(IMPORTS[what], tmp_path) for _ in range(5)]
    _report(benchmark, recorder, samples, "import", what, f"a fresh interpreter: {IMPORTS[what]}")


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("who", CALLS)
def test_torch_compile(who: str, benchmark: Any, recorder: Recorder, tmp_path: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples = [_cpu_seconds(COMPILE.format(device=device, call=CALLS[who]), tmp_path)]
    _report(benchmark, recorder, samples, "torch_compile_layer_norm", who, f"first call of a compiled {CALLS[who]} on {device}")


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("op", headline_ops()[:3])
def test_kernel_compile(op: str, benchmark: Any, recorder: Recorder, tmp_path: Path) -> None:
    """One Triton kernel compiled for sm_90 with an empty cache, the start of Python and the imports included."""
    forward = re.compile(rf"{op}_(?!.*bwd).*kernel")
    case = audit_cases((90,), lambda case: case["dtype"] == "bf16" and forward.fullmatch(case["kernel"]) is not None)[0]
    samples = [_cpu_seconds(KERNEL.format(case=case), tmp_path / str(i)) for i in range(3)]
    _report(benchmark, recorder, samples, f"kernel_sm90_{op}", "ours", "one forward kernel in bf16, imports included")


def _export_onnx(folder: Path) -> Path:
    from fused_ops.export import export_onnx

    return export_onnx(MODELS[0].build().eval(), (MODELS[0].inputs(1, "cpu", torch.float32),), folder / "model.onnx")


def _export_torchscript(folder: Path) -> Path:
    from fused_ops.export import export_torchscript

    return export_torchscript(MODELS[0].build().eval(), (MODELS[0].inputs(1, "cpu", torch.float32),), folder / "model.pt")


EXPORTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "onnx": (_export_onnx, ("onnx", "onnxscript")),
    "torchscript": (_export_torchscript, ()),
}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("form", EXPORTS)
def test_export(form: str, benchmark: Any, recorder: Recorder, tmp_path: Path) -> None:
    export, needs = EXPORTS[form]
    if reason := missing(*needs):
        recorder.add(
            op="startup",
            case=f"export_{form}_minilm",
            kind="startup",
            provider="ours",
            role="ours",
            status="absent",
            reason=reason,
        )
        pytest.skip(reason)
    samples = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        start = time.process_time()
        path = export(tmp_path / str(i))
        samples.append(time.process_time() - start)
        assert path.stat().st_size > 1 << 20
    _report(benchmark, recorder, samples, f"export_{form}_minilm", "ours", "an encoder of MiniLM's size, random weights, fp32")


@pytest.mark.benchmark(timer=CLOCK)
def test_build_engine(benchmark: Any, recorder: Recorder, tmp_path: Path) -> None:
    """A TensorRT engine built from that ONNX file; TensorRT for RTX needs no GPU for it."""
    reasons = [missing("onnx", "onnxscript", m) for m in ("tensorrt_rtx", "tensorrt")]
    if "" not in reasons:
        recorder.add(
            op="startup",
            case="build_engine_minilm",
            kind="startup",
            provider="ours",
            role="ours",
            status="absent",
            reason=reasons[0],
        )
        pytest.skip(reasons[0])
    from fused_ops.export import build_engine

    path = _export_onnx(tmp_path)
    samples = []
    for i in range(2):
        start = time.process_time()
        report = build_engine(path, tmp_path / f"{i}.engine", progress=False)
        samples.append(time.process_time() - start)
        assert report.bytes > 1 << 20
    _report(
        benchmark, recorder, samples, "build_engine_minilm", "ours", f"{report.backend} {report.version}, {report.bytes} bytes"
    )
