"""What `import fused_ops` loads, and what that costs as a count: modules and files. How long it takes: bench/test_5_startup.py."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests import process

HEAVY = (
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "typer",
    "rich",
    "pandas",
    "matplotlib",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "fused_ops.kernels",
    "fused_ops.export",
)
MODULES = 130  # 111 today, about five an op
OF_PYTHON = 5  # modules of the standard library that no version of torch from 2.13 to 2.15 lacks; none today
STARTED = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "_thread.start_new_thread",
    "socket.connect",
)
IMPORTING = """
import json, sys, threading
import torch
threads = threading.active_count()
before, opened, started, noting = set(sys.modules), [], [], True
def note(event, arguments):
    if noting and event == "open":
        opened.append(str(arguments[0]))
    elif noting and event in {started!r}:
        started.append(event)
sys.addaudithook(note)
{statement}
noting = False
started += ['thread'] * (threading.active_count() - threads)
print(json.dumps(dict(modules=sorted(set(sys.modules) - before), opened=opened, started=started)))
"""


def _modules_after(statement: str, cwd: Path) -> set[str]:
    program = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(process.output(program, cwd=cwd)))


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    added = _modules_after("import torch, fused_ops", tmp_path) - _modules_after("import torch", tmp_path)
    assert "fused_ops" in added
    assert not sorted(m for m in added for heavy in HEAVY if m == heavy or m.startswith(heavy + "."))


def test_export_package_loads_nothing_heavy(tmp_path: Path) -> None:
    """fused_ops.export itself too: its names load their modules when first used."""
    added = _modules_after("import torch, fused_ops.export", tmp_path) - _modules_after("import torch", tmp_path)
    heavy = [name for name in HEAVY if name != "fused_ops.export"]
    assert "fused_ops.export" in added
    assert not sorted(m for m in added for name in heavy if m == name or m.startswith(name + "."))


@pytest.mark.parametrize(
    "hidden", [("triton",), ("onnx", "onnxruntime", "onnxscript"), ("tensorrt", "tensorrt_rtx"), ("rich", "typer")]
)
def test_ops_work_without(hidden: tuple[str, ...], tmp_path: Path) -> None:
    """No optional package, and not even triton, is needed to import and to run on the CPU."""
    program = f"""
import sys
for name in {hidden!r}:
    sys.modules[name] = None
import torch
from fused_ops import fused_layernorm
print(fused_layernorm(torch.ones(2, 3), [3]).abs().max().item())
"""
    assert float(process.output(program, cwd=tmp_path)) == 0.0


def _cost_of(statement: str, cwd: Path) -> list[str]:
    """What the statement does, over `import torch`, that `import fused_ops` may not do."""
    program = IMPORTING.format(started=STARTED, statement=statement)
    cost = json.loads(process.output(program, cwd=cwd))
    roots = {name: name.split(".")[0] for name in cost["modules"]}
    ours = [name for name in roots if roots[name] == "fused_ops"]
    others = [name for name in roots if roots[name] != "fused_ops"]
    found = [f"{len(ours)} modules of fused_ops, at most {MODULES}"] if len(ours) > MODULES else []
    found += [f"loads {name}" for name in others if roots[name] not in sys.stdlib_module_names]
    found += [f"loads {others}, at most {OF_PYTHON}"] if len(others) > OF_PYTHON else []
    found += [f"reads {path}" for path in cost["opened"] if not re.search(r"\.pyc?(\.\d+)?$", path)]  # .pyc.123: being written
    return found + [f"starts {event}" for event in cost["started"]]


def test_import_costs_its_own_modules_only(tmp_path: Path) -> None:
    assert _cost_of("import fused_ops", tmp_path) == []


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import onnx", "loads onnx"),
        ("import fused_ops; open('/proc/self/stat').close()", "reads /proc/self/stat"),
        ("import subprocess; subprocess.run(['true'])", "starts subprocess.Popen"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "starts thread"),
        ("import fused_ops.export, sys; sys.modules |= {f'fused_ops.m{i}': sys for i in range(99)}", "modules of fused_ops"),
    ],
)
def test_a_cost_of_importing_is_found(statement: str, found: str, tmp_path: Path) -> None:
    """The check itself, on what it must refuse."""
    assert any(found in line for line in _cost_of(statement, tmp_path))
