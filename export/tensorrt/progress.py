"""Show the builder's progress, by a rich bar or a caller's function, and let Ctrl-C cancel a build cleanly."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

ProgressFn = Callable[[str, int, int], Any]  # (phase, step, steps); returning False cancels


class Watch:
    """The progress of one build, and whether to cancel it. TensorRT may call the methods from several threads."""

    def __init__(self, listener: ProgressFn | None) -> None:
        self.listener = listener
        self.cancelled = False
        self.error: BaseException | None = None
        self.steps: dict[str, int] = {}

    def start(self, phase: str, steps: int) -> None:
        self.steps[phase] = steps
        self._tell(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        self._tell(phase, step + 1)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        self._tell(phase, self.steps.get(phase, 0))
        self.steps.pop(phase, None)

    def _tell(self, phase: str, step: int) -> None:
        if self.listener is None or self.cancelled:
            return
        try:
            if self.listener(phase, step, self.steps.get(phase, 0)) is False:
                self.cancelled = True
        except BaseException as error:  # must not cross the C++ frames of the builder: raised again after them
            self.cancelled, self.error = True, error


def native_monitor(trt: Any, watch: Watch) -> Any:
    """A trt.IProgressMonitor that passes each call to watch."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watch.finish(phase_name)

    return Monitor()


@contextlib.contextmanager
def watching(progress: bool | ProgressFn | None, title: str) -> Iterator[Watch]:
    """Yield a Watch for one build. Ctrl-C cancels the build; KeyboardInterrupt is raised once the builder has returned."""
    with _listener(progress, title) as listener:
        watch = Watch(listener)
        interrupted = False

        def on_interrupt(*_: Any) -> None:
            nonlocal interrupted
            interrupted = watch.cancelled = True

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, on_interrupt) if main else None
        try:
            yield watch
        finally:
            if main:
                signal.signal(signal.SIGINT, before or signal.default_int_handler)
            if watch.error is not None:
                raise watch.error
            if interrupted:
                raise KeyboardInterrupt(f"{title}: cancelled")


@contextlib.contextmanager
def _listener(progress: bool | ProgressFn | None, title: str) -> Iterator[ProgressFn | None]:
    if callable(progress):
        yield progress
        return
    if progress is None:
        progress = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    if not progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(phase: str, step: int, steps: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(f"{title}: {phase}" if not tasks else f"  {phase}", total=steps)
            bar.update(tasks[phase], completed=step)
            if step >= steps and len(tasks) > 1:
                bar.remove_task(tasks.pop(phase))

        yield show
