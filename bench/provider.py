"""The interface of a provider, and what it is given."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fused_ops._torch.spec import Case, Op


class Unsupported(Exception):  # noqa: N818 - the ordinary answer of most providers to most ops
    """Raised by prepare when a provider does not have this op, dtype or pass. Its message is the reason."""


@dataclass(frozen=True)
class Workload:
    """What a provider prepares for. args, kwargs: one set of the public function's arguments; other sets differ in the
    inputs but have equal parameters. pass_: "fwd", "train_fwd", "bwd" or "fwd+bwd"; all but the first need autograd."""

    spec: Op
    case: Case
    pass_: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str

    @property
    def op(self) -> str:
        return self.spec.name

    @property
    def trains(self) -> bool:
        return self.pass_ != "fwd"

    def inference_only(self, name: str) -> None:
        """Refuse the passes that need autograd."""
        if self.trains:
            raise Unsupported(f"{name} runs inference only")


@dataclass(frozen=True)
class Prepared:
    """What a provider prepared. call takes the public function's arguments; configuration describes the set-up, for the CSV.

    no_graph: why its calls cannot be captured in a CUDA graph of torch's stream; "" when that is to be tried.
    """

    call: Callable[..., Any]
    configuration: str = ""
    no_graph: str = ""


class Provider:
    """An implementation to measure. Subclasses set name and implement the two methods."""

    name: str
    role = "peer"

    def available(self, device: str) -> str:
        """Why this provider cannot be used with tensors on device; "" when it can."""
        raise NotImplementedError

    def prepare(self, work: Workload) -> Prepared:
        """Do everything that may take long (compile, tune, build). Raises Unsupported, with the reason, if it cannot."""
        raise NotImplementedError


class _TooLong(BaseException):
    """The time is up. No Exception, so that no library's own handler keeps it."""


@contextlib.contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Run the block for at most so many seconds. Outside the main thread, or without SIGALRM, nothing limits it.

    Raises:
        Unsupported: the time is up. A library that was compiling or tuning is interrupted between two of its Python steps.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def up(*_: Any) -> None:
        raise _TooLong

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, up)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, should a library lose the first
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TooLong:
        raise Unsupported(f"{what} took more than {seconds:g} s to get ready") from None
    finally:
        signal.signal(signal.SIGALRM, handler)
        if left:  # whoever had set the timer before gets what is left of it
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


def missing(*modules: str) -> str:
    """Why the modules cannot be used, naming one that cannot be imported; "" if all can."""
    return next((reason for reason in map(_missing, modules) if reason), "")


def _missing(module: str) -> str:
    try:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        importlib.import_module(module)
    except Exception as error:  # a peer that breaks at import is absent, with its message
        first = (str(error).strip().splitlines() or [""])[0]
        return f"import {module} failed: {type(error).__name__}: {first[:160]}"
    return ""


def needs_cuda(device: str) -> str:
    """Why a provider that needs CUDA cannot be used on device; "" if it can."""
    return "" if device.startswith("cuda") and torch.cuda.is_available() else "needs a CUDA device"
