"""Inlining by wrap_triton: with FUSED_OPS_INLINE=1 the compiled code holds our kernels and no operator of ours, and an
AOTInductor package made so loads and runs in a process that never imports fused_ops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import torch, fused_ops
from torch._inductor.utils import run_and_get_code
torch.manual_seed(0)
x, w, b = torch.randn(64, 1000, device="cuda"), torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
if {grad}:
    x.requires_grad_(), w.requires_grad_()
def f(x, w, b):
    return fused_ops.fused_softmax(fused_ops.fused_layernorm(x + 1, (1000,), w, b) * 2, -1)
out, codes = run_and_get_code(torch.compile(f, fullgraph=True), x, w, b)
if {grad}:
    dy = torch.randn_like(out)
    got, want = torch.autograd.grad(out, (x, w), dy), torch.autograd.grad(f(x, w, b), (x, w), dy)
    for g, e in zip(got, want):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(out, f(x, w, b), rtol=1e-5, atol=1e-6)
code = "\\n".join(codes)
assert "layer_norm_fwd" in code and "softmax_fwd" in code, "the kernels are not in the generated code"
opaque = [line.strip() for line in code.splitlines() if "torch.ops.fused_ops" in line and "=" in line]
assert ({inline} and not opaque) or (not {inline} and opaque), opaque
print("checked")
"""
PACKAGE = """
import torch, fused_ops
class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(256)
    def forward(self, x):
        return fused_ops.fused_layernorm(torch.relu(x), (256,), self.norm.weight, self.norm.bias)
torch.manual_seed(0)
m, x = M().cuda().eval(), torch.randn(32, 256, device="cuda")
with torch.no_grad():
    ep = torch.export.export(m, (x,))
    torch._inductor.aoti_compile_and_package(ep, package_path={package!r})
    torch.save({{"x": x.cpu(), "y": m(x).cpu()}}, {tensors!r})
print("checked")
"""
LOAD = """
import sys, torch
saved = torch.load({tensors!r}, weights_only=True)
y = torch._inductor.aoti_load_package({package!r})(saved["x"].cuda())
y = y if isinstance(y, torch.Tensor) else y[0]
torch.testing.assert_close(y.cpu(), saved["y"], rtol=1e-5, atol=1e-5)
assert "fused_ops" not in sys.modules
print("checked")
"""


NO_TOOLKIT = ("cuda.h: No such file", "cuda_runtime.h: No such file", "cannot find -lcuda", "nvcc", "CUDA_HOME")


def run(code: str, inline: bool, folder: Path, path: bool = True) -> None:
    """The code in a process of its own, with empty caches of Inductor's."""
    environment = {**os.environ, "FUSED_OPS_INLINE": str(int(inline)), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    environment["PYTHONPATH"] = str(ROOT) if path else ""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=folder, timeout=150
    )
    missing = next((name for name in NO_TOOLKIT if name in done.stderr), None)
    if done.returncode != 0 and code.count("aoti_compile") and missing:
        pytest.skip(f"AOTInductor compiles C++ against the CUDA toolkit, which is not whole here: {missing}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("checked")


@pytest.mark.seconds(120)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("inline", [True, False], ids=["inlined", "opaque"])
def test_compiled_code(inline: bool, grad: bool, tmp_path: Path) -> None:
    run(COMPILE.format(inline=inline, grad=grad), inline, tmp_path)


@pytest.mark.seconds(180)
def test_package_needs_no_fused_ops(tmp_path: Path) -> None:
    files = {"package": str(tmp_path / "m.pt2"), "tensors": str(tmp_path / "t.pt")}
    run(PACKAGE.format(**files), True, tmp_path)
    run(LOAD.format(**files), False, tmp_path, path=False)
    assert torch.cuda.is_available()
