"""What bench/gpu.sh runs, as data: a plan is an ordered list of steps, each with the most seconds that it may take.

The order is that of value: correctness, the launch path, the headline rows with eager and ours, then the peers. A run that is
cut anywhere leaves what its steps have measured. A later plan is one more entry of PLANS.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

CLOSE_S = 5.0  # kept back for the summary and results.tar.gz
GRACE_S = 6.0  # between the moment that measuring stops and a step's limit: to finish one measurement and write the files


@dataclass(frozen=True)
class Step:
    """One step of a plan: a command in a process of its own.

    Attributes:
        command: its words. {out} is the folder of the results, {seconds} the seconds that it may work, {tables} a folder
            for tuned tables, {wheels} one for installed peers, {again} the tests named by --again.
        limit_s: the most seconds that it may take.
        measures: it runs a file of bench/ by pytest, which gets the CSV, the JSON and its deadline.
        needs: a tool of CUDA, or a folder of the repository ending in "/", without which the step is skipped.
        grows: it also gets the seconds that earlier steps have saved.
        kept: its seconds are kept back for it, however long the others take.
    """

    name: str
    what: str
    command: tuple[str, ...]
    limit_s: float
    measures: bool = False
    needs: str = ""
    grows: bool = False
    kept: bool = False

    @property
    def least_s(self) -> float:
        """With fewer seconds than these the step is not begun."""
        return min(8.0, self.limit_s)


@dataclass(frozen=True)
class Plan:
    """seconds: how long the plan takes at the most. what: the question that it answers."""

    what: str
    seconds: float
    steps: tuple[Step, ...]


PYTHON = sys.executable
PYTEST = (
    PYTHON,
    "-m",
    "pytest",
    "-v",
    "--no-header",
    "--tb=short",
    "-p",
    "no:xdist",
    "-p",
    "no:cacheprovider",
    "--benchmark-columns=median,iqr,rounds",
)
MATRIX = (*PYTEST, "bench/test_3_matrix.py", "--bench-patience=25")


def _correctness(*paths: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "bench.correctness", "{out}/correctness.csv", "--processes", "12", "--timeout", "40", "--seconds", "{seconds}", *paths)  # fmt: skip


def _sanitizer(tool: str) -> Step:
    return Step(tool, f"compute-sanitizer's {tool} over our kernels", (PYTHON, "-m", "bench.sanitize", tool), 27, needs="compute-sanitizer")  # fmt: skip


def _precompile(rows: str, limit_s: float) -> Step:
    command = (PYTHON, "-m", "bench.precompile", "--rows", rows, "--seconds", "{seconds}")
    return Step("precompile", f"compile the {rows} kernels, a process a core", command, limit_s)


def _sweep(name: str, what: str, numbers: str, limit_s: float) -> Step:
    return Step(name, what, (*MATRIX, f"--bench-sweep={numbers}"), limit_s, measures=True, grows=True)


WHEELS = Step(
    "wheels", "install the peers that .whl holds", ("bash", "bench/wheels_install.sh", ".whl", "{wheels}"), 20, needs=".whl/"
)
PROBE = Step("probe", "versions, the launch path, each op once", (PYTHON, "-m", "bench.probe"), 20)
ROOFLINE = Step("roofline", "copy bandwidth and matrix rates", (*PYTEST, "bench/test_1_roofline.py"), 20, measures=True)
ROOFLINE_AGAIN = Step("roofline-again", "the same at the end", ROOFLINE.command, 18, measures=True, kept=True)
HOST = Step("host", "host time of a call", (*PYTEST, "bench/test_2_host.py"), 20, measures=True)
MODELS = Step(
    "models",
    "whole models: inference and a training step",
    (*PYTEST, "bench/test_4_models.py", "--bench-patience=25"),
    40,
    measures=True,
)
TUNE = Step("tune", "configurations of the row kernels", (PYTHON, "-m", "fused_ops", "tune", "--dtype", "bf16", "--seconds", "{seconds}"), 40)  # fmt: skip
PROFILE = Step("profile", "hardware counters of our kernels", (PYTHON, "-m", "bench.profile"), 25, needs="ncu")
TENSORRT = Step("tensorrt", "build an engine with TensorRT for RTX, and run it", (PYTHON, "-m", "bench.tensorrt_probe"), 30)
AGAIN = Step("again", "the tests named by --again", _correctness("{again}"), 40, needs="{again}")

PLANS: dict[str, Plan] = {
    "first": Plan(
        "Is it right, does the launch path hold, and how fast are the headline rows beside eager?",
        300,
        (
            WHEELS, PROBE, _precompile("correctness", 40),
            Step("correctness", "every op, forward and backward, held to the contract", _correctness("tests/gpu"), 68),
            ROOFLINE, HOST, _sweep("headline", "headline rows: eager, ours, cuBLASLt", "1", 80), _sanitizer("memcheck"),
        ),
    ),
    "second": Plan(
        "How do the peers do on the same rows, and whole models?",
        400,
        (
            WHEELS, AGAIN, _precompile("headline", 20), ROOFLINE, _sweep("headline", "headline rows: eager, ours, cuBLASLt", "1", 60),
            Step("prewarm", "torch.compile of the headline rows, in parallel", (PYTHON, "-m", "bench.prewarm", "--seconds", "{seconds}"), 40),
            _sweep("compile", "headline rows: torch.compile", "2", 35), _sweep("peers", "headline rows: other libraries", "3", 40),
            MODELS, TUNE, PROFILE, ROOFLINE_AGAIN,
        ),
    ),
    "tensorrt": Plan(
        "How does TensorRT for RTX do on the same rows and models?",
        150,
        (
            WHEELS, TENSORRT, _sweep("engines", "headline rows: TensorRT", "4", 60),
            replace(MODELS, command=(*MODELS.command, "--bench-only=tensorrt"), limit_s=30),
        ),
    ),
    "rest": Plan(
        "Everything else: the whole matrix, the startup times, races.",
        900,
        (
            WHEELS, PROBE, _precompile("correctness", 60), ROOFLINE,
            Step("matrix", "every op, case, pass and provider, in priority order", MATRIX, 500, measures=True, grows=True),
            MODELS, _sanitizer("racecheck"),
            TENSORRT, ROOFLINE_AGAIN,
        ),
    ),
}  # fmt: skip
