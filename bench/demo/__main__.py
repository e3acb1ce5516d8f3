"""Run the demo: a progress bar, the fuse report, one table, build/demo/report.json, and the exit status."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .rows import Row, failed, table

for _switch in ("TRITON_INTERPRET", "FUSED_OPS_BACKEND"):  # this process exports: ATen on the CPU, Triton on a GPU
    os.environ.pop(_switch, None)

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "demo"
ARTEFACTS = ("minilm.onnx", "minilm.engine", "minilm.engine.manifest.json", "minilm.pt")
KERNEL_STAGES = 4
MIN_WIDTH = 132


@dataclass
class Demo:
    """The state that steps share: where things go, what runs, and the bar."""

    console: Console
    bar: Progress
    task: Any
    model: Any = None
    report: Any = None
    device: str = "cpu"
    times: dict[str, float] | None = None

    def say(self, text: str) -> None:
        self.bar.update(self.task, description=text)

    def advance(self) -> None:
        self.bar.advance(self.task)


def fuse_step(demo: Demo) -> list[Row]:
    import torch
    from torch import nn

    from fused_ops import fuse

    from . import minilm

    demo.device = "cuda" if torch.cuda.is_available() else "cpu"
    demo.model = minilm.load()
    config, keys = demo.model.config, list(demo.model.state_dict())
    norms = sum(isinstance(module, nn.LayerNorm) for module in demo.model.modules())
    demo.report = fuse(demo.model, strict=True)
    counts = demo.report.counts()
    changed = len(set(keys) ^ set(demo.model.state_dict()))
    linears = config.num_hidden_layers + 1  # one in each layer's feed-forward part, and the pooler's
    return [
        Row("fuse", "LayerNorms fused", counts.get("layer_norm", (0, 0))[0], "==", norms, "of transformers' own BertModel"),
        Row("fuse", "Linears fused with their activation", counts.get("linear", (0, 0))[0], "==", linears, "gelu, tanh"),
        Row("fuse", "state_dict keys changed", changed, "==", 0),
    ]


def kernel_step(demo: Demo) -> list[Row]:
    """Embeddings and the training step, in a process whose CPU tensors run the kernels too."""
    out, log = OUT / "kernels.json", OUT / "kernels.log"
    environment = dict(os.environ) | ({} if demo.device == "cuda" else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "bench.demo.kernels", demo.device, str(out)]
    how = "on the GPU" if demo.device == "cuda" else "in Triton's interpreter"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            for stage, line in enumerate(process.stdout):
                demo.say(f"kernels {how}: {line.strip()}")
                if 0 < stage < KERNEL_STAGES:
                    demo.advance()
            status = process.wait()
        finally:
            process.kill()
    if status:
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the kernels' process ended with status {status}: {last} (all of it: {log.relative_to(ROOT)})")
    result = json.loads(out.read_text())
    out.unlink()
    log.unlink()
    demo.times = result["times"]
    return [Row(**row) for row in result["rows"]]


def compile_step(demo: Demo) -> list[Row]:
    from . import deploy

    model = demo.model.to(demo.device)
    try:
        return deploy.compile_rows(model, demo.device)
    finally:
        model.to("cpu")


def onnx_step(demo: Demo) -> list[Row]:
    from . import deploy

    return deploy.onnx_rows(demo.model, OUT / "minilm.onnx", demo.report.counts()["layer_norm"][0])


def engine_step(demo: Demo) -> list[Row]:
    from . import deploy

    def progress(phase: str, step: int, steps: int) -> bool:
        demo.say(f"TensorRT engine: {phase} {step}/{steps}")
        return True

    weights = sum(p.numel() * p.element_size() for p in demo.model.parameters())
    return deploy.engine_rows(OUT / "minilm.onnx", OUT / "minilm.engine", weights, progress)


def script_step(demo: Demo) -> list[Row]:
    from . import deploy

    return deploy.script_rows(demo.model, OUT / "minilm.pt")


STEPS: tuple[tuple[str, Callable[[Demo], list[Row]]], ...] = (
    ("fuse", fuse_step),
    ("embed and train through the kernels", kernel_step),
    ("torch.compile", compile_step),
    ("ONNX", onnx_step),
    ("TensorRT engine", engine_step),
    ("TorchScript", script_step),
)


def run_steps(demo: Demo) -> tuple[list[Row], dict[str, float]]:
    """Every step, also after one has failed: its row says why, and the others still tell what they can."""
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for name, step in STEPS:
        demo.say(name)
        started = time.perf_counter()
        try:
            found = step(demo)
        except Exception as error:
            found = [failed(name, error)]
        seconds[name] = time.perf_counter() - started
        rows += found
        demo.advance()
        verdict = "ok" if all(row.passed for row in found) else "[bold red]missed[/]"
        demo.console.print(f"  {name}: {verdict}, {seconds[name]:.1f} s", highlight=False)
        if name == "fuse" and demo.report is not None:
            demo.console.print(demo.report)
    return rows, seconds


def run_details(demo: Demo) -> dict[str, Any]:
    """The report's entries about the run: model, GPU, how the kernels ran, and the versions."""
    import torch

    import fused_ops

    gpu = torch.cuda.get_device_name() if demo.device == "cuda" else None
    versions = {"fused_ops": fused_ops.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"model": "all-MiniLM-L6-v2", "gpu": gpu, "kernels": "GPU" if gpu else "interpreted", "versions": versions}


def artefacts() -> list[dict[str, Any]]:
    found = []
    for path in (OUT / name for name in ARTEFACTS):
        if path.exists():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.append({"file": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return found


def main() -> int:
    warnings.simplefilter("ignore")  # deprecations inside transformers and torch.jit, which its user cannot act on
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(width=max(Console().width, MIN_WIDTH))
    OUT.mkdir(parents=True, exist_ok=True)
    for name in (*ARTEFACTS, "kernels.log", "report.json"):  # nothing of an earlier run may stand for this one
        (OUT / name).unlink(missing_ok=True)
    started = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        demo = Demo(console, bar, bar.add_task("start", total=len(STEPS) + KERNEL_STAGES - 1))
        rows, seconds = run_steps(demo)
        bar.update(demo.task, description="done")
    total = time.perf_counter() - started
    missed = [row for row in rows if not row.passed]
    report = {
        "passed": not missed,
        "seconds": total,
        **run_details(demo),
        "rows": [row.as_dict() for row in rows],
        "step_seconds": seconds,
        "times_ms": demo.times or {},
        "fuse": [vars(candidate) for candidate in demo.report or ()],
        "artefacts": artefacts(),
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(table(rows, "all-MiniLM-L6-v2, from training to the engine"))
    for name, value in (demo.times or {}).items():
        console.print(f"  {name}: {value:.3f}", highlight=False)
    where = OUT.relative_to(ROOT)
    console.print(
        f"{len(rows) - len(missed)} of {len(rows)} rows within their bounds, {total:.0f} s; results in {where}/",
        highlight=False,
    )
    for row in missed:
        console.print(f"[bold red]{row.step}: {row.check}: {row.verdict()}[/] {row.note}", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
