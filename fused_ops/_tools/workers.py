"""Work in several processes, of which any may die: what it worked on is then a failure, and the rest goes on."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple


class Done(NamedTuple):
    """The outcome of items[item]: its result, or why there is none."""

    item: int
    result: Any
    error: str = ""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Any], Any], items: Sequence[Any], processes: int, deadline: float = float("inf")
) -> Iterator[Done]:
    """function(item) of every item, in forked processes; each outcome as it comes.

    function and items reach the processes by the fork, so both may be closures; results are pickled. An exception is an
    error, and so is a process that dies. deadline: a time.monotonic() after which the work that is left is dropped.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(range(len(items)))[::-1]
    running: dict[Connection, tuple[Any, int]] = {}  # the parent's end -> (process, the item it works on)
    started: list[Any] = []

    def start(index: int) -> None:
        ours, theirs = context.Pipe()
        ends = [*running, ours]
        process = context.Process(target=_work, args=(function, items, ends, theirs), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child waits for none
            process.start()
        theirs.close()
        started.append(process)
        ours.send(index)
        running[ours] = (process, index)

    try:
        for _ in range(min(max(processes, 1), len(items))):
            start(waiting.pop())
        while running:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for ours in wait(list(running), None if left == float("inf") else left):
                assert isinstance(ours, Connection)
                process, index = running[ours]
                try:
                    result, error = ours.recv()
                except (EOFError, OSError):
                    process.join()
                    result, error = None, f"its process ended with {process.exitcode}"
                if process.exitcode is None and waiting:
                    running[ours] = (process, waiting.pop())
                    ours.send(running[ours][1])
                else:
                    del running[ours]
                    ours.close()
                    if waiting:
                        start(waiting.pop())
                yield Done(index, result, error)
    finally:
        for ours in running:
            ours.close()
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _work(function: Callable[[Any], Any], items: Sequence[Any], parents: Sequence[Connection], ours: Connection) -> None:
    """What a process does: the items whose indices come, until the parent closes its end or is no more."""
    import torch

    for end in parents:  # with a copy of it open, no process would see that the parent has closed it
        end.close()
    torch.set_num_threads(1)
    while True:
        try:
            index = ours.recv()
        except (EOFError, OSError):
            os._exit(0)  # nothing of the parent is to be cleaned up here
        try:
            outcome = function(items[index]), ""
        except Exception as error:  # a failure is the item's outcome, whatever its type
            outcome = None, said(error)
        ours.send(outcome)


def said(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
