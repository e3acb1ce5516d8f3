"""What the numbers were measured on: the GPU and its clocks, the CPU, and the versions of everything that matters."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from pathlib import Path

import torch

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
    """The checkout's short commit, with "+" when tracked files differ from it; "" outside a repository."""
    sha = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return sha + ("+" if sha and changed else "")


@functools.cache
def environment() -> dict[str, str]:
    """The columns that every row of one run shares."""
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


def device_folder() -> str:
    """The name under bench/results/ for this machine's runs: the GPU's, or "cpu"."""
    gpu = environment()["gpu"]
    return gpu.lower().replace("nvidia ", "").replace(" ", "-") if gpu else "cpu"


def clocks() -> dict[str, str]:
    """SM and memory clock (MHz) and temperature (C) now; empty strings without nvidia-smi or a GPU."""
    names = ("clock_sm_mhz", "clock_mem_mhz", "temperature_c")
    values = _smi("clocks.sm,clocks.mem,temperature.gpu") if torch.cuda.is_available() else ""
    return dict(zip(names, values.split(", "))) if values else dict.fromkeys(names, "")
