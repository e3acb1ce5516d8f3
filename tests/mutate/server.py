"""python -m tests.mutate.server: runs pytest as often as it is asked to, each time in a fork of a process that has torch loaded.

Reads one JSON object a line, {"arguments", "seconds", "log"}, and answers with one, {"status"}: pytest's, or the negative
number of the signal that ended it, or null where it had not ended in time. The working directory holds the sources, which may change
from one run to the next: so nothing of fused_ops, kernels or export is imported here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time

from . import clock

PRELOADED = (
    "numpy", "pytest", "hypothesis", "torch", "torch.fx", "torch._dynamo", "torch.export", "torch.utils.checkpoint",
    "torch.utils.flop_counter", "torch.func", "triton", "triton.language", "triton.compiler", "triton.runtime.interpreter",
    "onnx", "onnxruntime", "onnxscript", "onnx_ir", "typer", "rich.table", "rich.progress",
)  # fmt: skip
OF_THE_PROJECT = frozenset(("fused_ops", "kernels", "export", "bench"))


def run(arguments: list[str], seconds: float, log: str) -> int | None:
    """pytest's exit status in a fork, whose output goes to the file log."""
    child = os.fork()
    if child == 0:
        os.setsid()  # so that what it starts ends with it
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        import pytest

        status = int(pytest.main(arguments))
        sys.stdout.flush()
        os._exit(status)
    end = clock.seconds() + seconds
    while True:
        done, how = os.waitpid(child, os.WNOHANG)
        if done:
            _end(child)
            return os.waitstatus_to_exitcode(how)
        if clock.seconds() > end:
            _end(child)
            os.waitpid(child, 0)
            return None
        time.sleep(0.05)


def _end(child: int) -> None:
    """End a run and what it started and left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def main() -> None:
    """Load what the tests load, and serve until the input ends."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    loaded = OF_THE_PROJECT.intersection(name.partition(".")[0] for name in sys.modules)
    assert not loaded, f"loaded before a run: {loaded}"
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"status": run(**json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
