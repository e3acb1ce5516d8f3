"""The results of a run as files: what each holds, how they are packed into one, and what a reader may expect.

A run leaves a folder of the files in FILES, and results.tar.gz with all of them in it, rewritten after every step. Whoever
reads either calls `results_load.load`, which trusts nothing: results come from other people's machines.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .files import read

FORMAT = 1
ARCHIVE = "results.tar.gz"
FILES = (
    "machine.json", "results.csv", "correctness.csv", "benchmark.json", "tuned.json", "summary.md", "inductor.jsonl", "log.txt",
)  # fmt: skip
MAX_BYTES = 16 << 20  # of a file
MAX_ARCHIVE = len(FILES) * (MAX_BYTES + 4096)  # of the archive, unpacked
LOG_BYTES = 4 << 20  # of the log, its end
CORRECTNESS_COLUMNS = ("test", "outcome", "seconds", "worker", "kernel", "message")
OUTCOMES = ("passed", "failed", "skipped", "error", "lost", "hang")
STEP_STATUSES = ("ok", "failed", "cut", "skipped", "lost")
MACHINE_TEXTS = ("gpu", "capability", "driver", "cuda", "python", "torch", "triton", "commit", "call")


class FormatError(ValueError):
    """Why a results file is not taken. The message names the file, and the field or line."""


@dataclass
class Results:
    """One run, checked. rows: of results.csv; correctness: of correctness.csv; the others as parsed, None where absent."""

    source: str
    machine: dict[str, Any]
    rows: list[dict[str, str]] = field(default_factory=list)
    correctness: list[dict[str, str]] = field(default_factory=list)
    benchmark: dict[str, Any] | None = None
    tuned: dict[str, Any] | None = None
    summary: str = ""


def machine_record(
    call: str, budget_s: float, started: datetime | str, steps: Iterable[Mapping[str, Any]] = (),
    ended: datetime | str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of machine.json: what the run was made on, when, and how each step ended.

    Args:
        call: the plan's name, such as "first".
        budget_s: seconds that the run was given.
        started, ended: times with their zone, or the same in ISO format; ended is now unless given.
        steps: mappings with name, status (one of STEP_STATUSES), seconds and said (one line).

    The host's name is not in it.
    """
    import torch

    from .environment import environment

    known = environment()
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else ""
    named = {**{name: str(known.get(name, "")) for name in MACHINE_TEXTS}, "capability": capability, "call": call}
    return {
        "format": FORMAT, **named, "budget_s": round(float(budget_s), 1),
        "started": _utc(started), "ended": _utc(ended or datetime.now(timezone.utc)),
        "steps": [
            {"name": str(s["name"]), "status": str(s["status"]), "seconds": round(float(s["seconds"]), 2), "said": str(s["said"])[:400]}
            for s in steps
        ],
    }  # fmt: skip


def _utc(when: datetime | str) -> str:
    when = datetime.fromisoformat(when) if isinstance(when, str) else when
    return when.astimezone(timezone.utc).isoformat(timespec="seconds")


def write_whole(path: Path, content: bytes) -> None:
    """Replace path by content, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_machine(out: Path, record: Mapping[str, Any]) -> None:
    """Replace out/machine.json."""
    write_whole(out / "machine.json", json.dumps(record, indent=1).encode())


def pack(out: Path) -> list[str]:
    """Rewrite out/results.tar.gz from the files of FILES in out. Returns what was left out or cut, one line each.

    A log larger than LOG_BYTES is packed without its beginning; any other file larger than MAX_BYTES is left out. The
    host's name, which pytest-benchmark notes, is taken out of benchmark.json, in the folder too.
    """
    notes = []
    _forget_host(out / "benchmark.json")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for name in FILES:
            try:
                content = read(out / name)
            except FileNotFoundError:
                continue
            except OSError as error:
                notes.append(f"{name}: left out: {error}")
                continue
            if name == "log.txt" and len(content) > LOG_BYTES:
                notes.append(f"{name}: its last {LOG_BYTES >> 20} MiB of {len(content)} bytes")
                content = content[-LOG_BYTES:]
            if len(content) > MAX_BYTES:
                notes.append(f"{name}: left out: {len(content)} bytes, allowed: {MAX_BYTES}")
                continue
            member = tarfile.TarInfo(name)  # no owner and no time: they say nothing about the run
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    write_whole(out / ARCHIVE, buffer.getvalue())
    return notes


def _forget_host(path: Path) -> None:
    """Take the host's name out of pytest-benchmark's file. What is no such file stays as it is: the reader refuses it."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        content = json.loads(read(path))
        if content["machine_info"].get("node"):
            content["machine_info"]["node"] = ""
            write_whole(path, json.dumps(content).encode())
