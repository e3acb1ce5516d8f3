"""What the providers of other kernel libraries share: their calls by op, one rehearsal in a limited time, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ops._runtime import settings

from ..inputs import outputs
from ..provider import Prepared, Provider, Unsupported, Workload, limited, missing, needs_cuda

Table = dict[str, Callable[[Workload], Callable[..., Any]]]
PREPARE_S = settings.BENCH_PREPARE_S
"""The most seconds that a peer may compile and tune for one row: longer would cost the rows of the others."""


class Library(Provider):
    """A library whose entry points are looked up by op. module: what must import; table: op -> the call to measure."""

    module: str

    def available(self, device: str) -> str:
        return needs_cuda(device) or missing(self.module)

    def table(self) -> Table:
        raise NotImplementedError

    def prepare(self, work: Workload) -> Prepared:
        make = self.table().get(work.op)
        if make is None:
            raise Unsupported(f"{self.name} has no {work.op}")
        with limited(PREPARE_S, self.name):
            call = make(work)
            rehearse(work, call)
        return Prepared(call, f"{self.module} {version_of(self.module)}")


def version_of(module: str) -> str:
    from ..environment import version

    return version({"quack": "quack-kernels"}.get(module, module.replace("_", "-"))) or "unknown version"


def rehearse(work: Workload, call: Callable[..., Any]) -> None:
    """One call of the pass, so that what compiles or tunes in a first call does so while the provider prepares."""
    if not work.trains:
        with torch.no_grad():
            call(*work.args, **work.kwargs)
    else:
        results = outputs(call(*work.args, **work.kwargs))
        leaves = [a for a in (*work.args, *work.kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        if work.pass_ != "train_fwd":
            torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
    if work.device.startswith("cuda"):
        torch.cuda.synchronize()


def rows_of(work: Workload, who: str, most: int | None = None) -> None:
    """Refuse what is no softmax over the last dimension of a matrix, or has rows longer than most."""
    x = work.args[0]
    dim = work.kwargs.get("dim", work.args[1] if len(work.args) > 1 else -1)
    if x.dim() != 2 or dim not in (-1, x.dim() - 1) or work.kwargs.get("dtype") is not None:
        raise Unsupported(f"{who} here: a matrix's last dimension")
    if most is not None and x.shape[-1] > most:
        raise Unsupported(f"{who} holds rows of at most {most}, not {x.shape[-1]}")


def affine(work: Workload, who: str) -> None:
    """Refuse a layer norm without weight and bias."""
    if len(work.args) < 4 or work.args[2] is None or work.args[3] is None:
        raise Unsupported(f"{who} wants a weight and a bias")


def weighted(work: Workload, who: str) -> None:
    """Refuse an RMS norm without weight."""
    if len(work.args) < 3 or work.args[2] is None:
        raise Unsupported(f"{who} wants a weight")


def epsilon(input: Tensor, eps: float | None) -> float:
    """What F.rms_norm takes where none is given."""
    return float(torch.finfo(input.dtype).eps) if eps is None else eps
