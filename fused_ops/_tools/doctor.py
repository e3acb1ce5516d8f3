"""installation(): what `fused-ops doctor` prints about an installation."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .._runtime import settings
from .._runtime.backend import chosen
from .._runtime.launch_path import launch_path
from .._torch.compile import COMPILE_WITH_ATEN
from .._torch.spec import REGISTRY
from ..ops.linear.dispatch import RULES
from .explain_compiled import when_compiled


def installation() -> dict[str, Any]:
    """Everything about this installation that decides what runs, JSON-serialisable. Launches and downloads nothing.

    refused: the environment's variables whose values mean nothing ("variable", "got", "allowed"); with one, `import fused_ops`
    raises SettingError, and "settings" has its default. unknown: variables that look like ours and are none.
    """
    packages = ("fused-ops", "torch", "triton", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13",
                "transformers", "tritonclient", "nvidia-modelopt")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend, reason = chosen(device)
    ops = [
        {
            "op": spec.public.__name__, "device": device, "backend": backend, "reason": reason,
            "when_compiling": when_compiled(name),
        }
        for name, spec in REGISTRY.items()
    ]  # fmt: skip
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in packages},
        "gpu": _gpu(),
        "settings": {
            "FUSED_OPS_BACKEND": settings.BACKEND, "TRITON_INTERPRET": settings.INTERPRET,
            "FUSED_OPS_NVTX": settings.NVTX, "FUSED_OPS_INLINE": settings.INLINE,
            "FUSED_OPS_CLUSTER": settings.CLUSTER, "FUSED_OPS_GLUON": settings.GLUON, "FUSED_OPS_LAUNCH": settings.LAUNCH,
            "FUSED_OPS_COMPILE_WITH_ATEN": sorted(name for name, on in COMPILE_WITH_ATEN.items() if on is True),
            "FUSED_OPS_CACHE": str(settings.user_folder()),
        },
        "refused": [asdict(refusal) for refusal in settings.REFUSED],
        "unknown": [{"variable": name, "nearest": nearest} for name, nearest in settings.unknown().items()],
        "launches": dict(zip(("way", "reason"), launch_path())),
        "ops": ops,
        "libraries": _libraries(),
        "exports": _exports(),
        "caches": _caches(),
    }  # fmt: skip


def _libraries() -> list[dict[str, Any]]:
    """Where, on a GPU, a library's product takes the place of our kernel, and why."""
    return [
        {
            "for": ", ".join(rule.uses), "activations": ", ".join(rule.activations) or "any", "from_rows": rule.least_rows,
            "dtypes": ", ".join(str(dtype)[6:] for dtype in rule.dtypes), "computes": rule.backend, "why": rule.reason,
        }
        for rule in RULES
    ]  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    cuda = torch.version.cuda
    if cuda is None:
        return {"available": False, "why": "this PyTorch was built without CUDA", "cuda": None}
    if not torch.cuda.is_available():
        return {"available": False, "why": "PyTorch finds no CUDA device or no driver", "cuda": cuda}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    text = Path("/proc/driver/nvidia/version")  # "NVRM version: NVIDIA UNIX ... Module  580.65.06  ..."
    found = re.search(r"\d+\.\d+(\.\d+)?", text.read_text()) if text.is_file() else None
    return {
        "available": True, "cuda": cuda, "driver": found[0] if found else None,
        "devices": [
            {
                "name": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
                "memory_bytes": p.total_memory, "supported": (p.major, p.minor) >= (8, 0),
            }
            for p in devices
        ],
    }  # fmt: skip


def _exports() -> list[dict[str, Any]]:
    """Each export target, the modules it needs, and what to install when one is missing."""
    targets = (
        ("onnx", ("onnx", "onnxscript", "onnxruntime"), "pip install 'fused-ops[onnx]'"),
        ("tensorrt", ("onnx", "tensorrt"), "pip install 'fused-ops[tensorrt]'"),
        ("tensorrt-rtx", ("onnx", "tensorrt_rtx"), "pip install 'fused-ops[tensorrt-rtx]'"),
        ("torchscript", (), ""),
        ("aoti", (), ""),
        ("quantize", ("onnx", "onnxruntime"), "pip install 'fused-ops[quantize]'"),
        ("repository", ("tritonclient",), "pip install 'fused-ops[serving]'"),
    )
    rows = []
    for target, modules, install in targets:
        missing = [m for m in modules if find_spec(m) is None]
        if target == "aoti" and not _compiler():
            missing, install = ["a C++ compiler"], "install g++ or clang++, or set CXX"
        rows.append({"target": target, "available": not missing, "missing": missing, "install": install if missing else ""})
    return rows


def _compiler() -> bool:
    from shutil import which

    return any(which(name) for name in (settings.cxx(), "g++", "clang++"))


def _caches() -> list[dict[str, Any]]:
    found = (("triton", settings.triton_cache()), ("inductor", settings.inductor_cache()))
    return [{"cache": name, "path": str(path), "exists": path.is_dir()} for name, path in found]
