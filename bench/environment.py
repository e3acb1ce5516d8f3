"""What the numbers were measured on: the GPU and its clocks, the CPU, and the versions of everything that matters."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str:
    """A command's output, or "" when it is absent or fails: a machine without git or nvidia-smi is still benchmarked."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _smi(query: str) -> str:
    lines = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits").splitlines()
    return lines[0] if lines else ""


def alone() -> dict[str, str]:
    """os.environ for a pytest that measures: without an outer pytest-xdist and PYTEST_ADDOPTS (such as -n auto).

    Under pytest-xdist, pytest-benchmark measures nothing and writes no JSON.
    """
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_") and k != "PYTEST_ADDOPTS"}


def version(package: str) -> str:
    """The installed version of a distribution, or ""."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return name


def commit() -> str:
    """What FUSED_OPS_COMMIT says, which knows better where files were carried beside an older repository; else the checkout's
    short commit, with "+" when tracked files differ from it; outside a repository ""."""
    from fused_ops._runtime import settings  # it imports torch: not before it is asked for

    if said := settings.commit():
        return said
    sha = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return sha + ("+" if changed else "") if sha else ""


@functools.cache
def environment() -> dict[str, str]:
    """The columns that every row of one run shares."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "driver": _smi("driver_version") if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }


def gpu_folder(name: str) -> str:
    """The name under bench/results/ for runs on a GPU of this name; "cpu" for "". Cards that differ never share one."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
    return {"": "cpu", "h100-80gb-hbm3": "h100"}.get(slug, slug)


def device_folder() -> str:
    """The name under bench/results/ for this machine's runs."""
    return gpu_folder(environment()["gpu"])


def clocks() -> dict[str, str]:
    """SM and memory clock (MHz) and temperature (C) now; empty strings without a GPU, or without NVML and nvidia-smi.

    nvidia-smi takes a good part of a second: asked at most every five.
    """
    import torch

    names = ("clock_sm_mhz", "clock_mem_mhz", "temperature_c")
    if not torch.cuda.is_available():
        return dict.fromkeys(names, "")
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        kinds = (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)
        values = [pynvml.nvmlDeviceGetClockInfo(card, kind) for kind in kinds]
        return dict(zip(names, map(str, [*values, pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)])))
    except Exception:
        said = _smi_clocks(int(time.monotonic() / 5))
    return dict(zip(names, said.split(", "))) if said else dict.fromkeys(names, "")


@functools.lru_cache(1)
def _smi_clocks(_: int) -> str:
    return _smi("clocks.sm,clocks.mem,temperature.gpu")
