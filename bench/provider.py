"""The interface of a provider, and what it is given."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fused_ops._torch.spec import Case, OpSpec


class Unsupported(Exception):  # noqa: N818 - the ordinary answer of most providers to most ops
    """Raised by prepare when a provider does not have this op, dtype or pass. Its message is the reason."""


@dataclass(frozen=True)
class Workload:
    """What a provider prepares for. args, kwargs: one set of the public function's arguments; other sets differ in the
    inputs but have equal parameters. pass_: "fwd", "train_fwd", "bwd" or "fwd+bwd"; all but the first need autograd."""

    spec: OpSpec
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
