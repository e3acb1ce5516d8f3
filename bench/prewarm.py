"""Fill the compile caches for the headline rows in parallel, so that the process that measures finds what it compiles.

    python -m bench.prewarm [--processes N] [--seconds S] [--providers compile,liger] [--only PATTERN] [--device cuda]

Each process takes its share of the rows, prepares the provider and runs the pass once. What is left behind is Inductor's graph
cache (TORCHINDUCTOR_CACHE_DIR), Triton's, and quack's. No choice between configurations is kept: that is made by whoever
measures, with the GPU to itself. The last line says how many were made, in how many seconds, and what failed first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .environment import ROOT, alone
from .failure import first_line
from .headline import headline_tasks
from .inputs import argument_sets
from .measure import release, step_of
from .provider import Unsupported, Workload
from .providers import by_name
from .providers import library as peer_library
from .tasks import Task

PROVIDERS = ("compile", "liger", "flag-gems", "helion", "quack")
PEER_S = 20.0  # a peer may compile for so long here, where it takes nobody's time
Pair = tuple[Task, str]


def rows(providers: Iterable[str], only: str = "") -> list[Pair]:
    """(task, provider) to prepare: one provider after the other, and of the passes that compile the same only the first."""
    found: dict[tuple[str, ...], Pair] = {}
    for provider in providers:
        for task in headline_tasks():
            trains = str(task.pass_ != "fwd") if provider == "compile" else task.pass_
            key = (provider, task.spec.name, task.case.name, task.key["dtype"], trains)
            if re.search(only, f"{task.id}-{provider}"):
                found.setdefault(key, (_backward(task) if trains == "True" else task, provider))
    return list(found.values())


def _backward(task: Task) -> Task:
    """The pass that compiles the forward with gradients and the backward."""
    return Task(task.spec, task.case, "fwd+bwd", task.kind)


def prewarm(pairs: Iterable[Pair], device: str, deadline: float = float("inf")) -> Iterator[dict[str, Any]]:
    """Prepare and run each pair in this process until time.monotonic() reaches deadline; yields what became of each.

    The dictionary has "id" and "outcome": "made", "unsupported" or "failed"; "hits", how many graphs came from Inductor's
    cache, and "misses"; "error", the first line of a failure.
    """
    _keep_no_choices()
    absent: dict[str, str] = {}
    for task, name in pairs:
        if time.monotonic() >= deadline:
            return
        if name not in absent:
            absent[name] = by_name(name).available(device)
        before = _graphs()
        said = {"id": f"{task.id}-{name}", "outcome": "unsupported", "error": absent[name]}
        if not absent[name]:
            said |= _run(task, name, device)
        counted = _graphs()
        yield said | {"hits": counted[0] - before[0], "misses": counted[1] - before[1]}
        release()


def _run(task: Task, name: str, device: str) -> dict[str, str]:
    try:
        arguments = argument_sets(task, 1, device)[0]
        work = Workload(task.spec, task.case, task.pass_, arguments.args, arguments.kwargs, device)
        step_of(task, by_name(name).prepare(work).call, arguments)()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    except Unsupported as reason:
        return {"outcome": "unsupported", "error": str(reason)}
    except Exception as error:
        return {"outcome": "failed", "error": first_line(error)}
    return {"outcome": "made", "error": ""}


def _keep_no_choices() -> None:
    """Compile without workers of its own, and without writing down which configuration was fastest beside others' kernels."""
    from torch._inductor import config

    config.compile_threads = 1
    config.autotune_local_cache = False
    peer_library.PREPARE_S = PEER_S


def _graphs() -> tuple[int, int]:
    """(hits, misses) of Inductor's graph cache so far in this process."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


def share(arguments: argparse.Namespace) -> None:
    """One process's part: a JSON line for each row."""
    number, total = map(int, arguments.share.split("/"))
    deadline = time.monotonic() + arguments.seconds
    for said in prewarm(rows(arguments.providers.split(","), arguments.only)[number::total], arguments.device, deadline):
        print(json.dumps(said), flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Start the processes, end them at the deadline, and say in one line what they did."""
    start = time.monotonic()
    wanted = rows(arguments.providers.split(","), arguments.only)
    processes = max(1, min(arguments.processes or os.cpu_count() or 1, len(wanted)))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        outs = [Path(name) / str(n) for n in range(processes)]
        children = []
        for number, out in enumerate(outs):
            command = [
                sys.executable, "-m", "bench.prewarm", "--share", f"{number}/{processes}", "--seconds", str(arguments.seconds),
                "--providers", arguments.providers, "--only", arguments.only, "--device", arguments.device,
            ]  # fmt: skip
            errors = stack.enter_context(out.with_suffix(".err").open("wb"))
            file = stack.enter_context(out.open("wb"))
            children.append(subprocess.Popen(command, stdout=file, stderr=errors, cwd=ROOT, env=alone()))
        try:
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(start + arguments.seconds - time.monotonic(), 0.1))
        finally:
            for child in children:
                child.kill()
                child.wait()
        said = [json.loads(line) for out in outs for line in out.read_text().splitlines() if line.endswith("}")]
        died = [_last_words(out) for out, child in zip(outs, children) if child.returncode not in (0, -9)]
    return tell(said, len(wanted), died, processes, time.monotonic() - start)


def _last_words(out: Path) -> str:
    return (out.with_suffix(".err").read_text(errors="replace").strip().splitlines() or ["no message"])[-1][:200]


def tell(said: list[dict[str, Any]], wanted: int, died: list[str], processes: int, seconds: float) -> int:
    """Print the outcome in one line; 1 if every row that was tried failed or a process died, else 0."""
    count = Counter(s["outcome"] for s in said)
    hits, misses = sum(s["hits"] for s in said), sum(s["misses"] for s in said)
    failed = [f"{s['id']}: {s['error']}" for s in said if s["outcome"] == "failed"] + [f"a process died: {d}" for d in died]
    for line in failed:
        print(line)
    print(
        f"prewarm: {count['made']} of {wanted} made ({hits} graphs were cached, {misses} compiled), {count['unsupported']} "
        f"unsupported, {count['failed']} failed, {wanted - len(said)} not reached; {processes} processes, {seconds:.0f} s"
        + (f"; first: {failed[0][:120]}" if failed else "")
    )
    return int(bool(died) or bool(failed and not count["made"]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prewarm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, help="how many; by default one a core")
    parser.add_argument("--seconds", type=float, default=600, help="end after so many seconds (default 600)")
    parser.add_argument("--providers", default=",".join(PROVIDERS), help=f"by default {','.join(PROVIDERS)}")
    parser.add_argument("--only", default="", help="regular expression on a measurement's id")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("prewarm: needs a CUDA device")
        return 2
    if arguments.share:
        share(arguments)
        return 0
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
