"""The benchmark rows that matter most, as launches: each op's headline cases, called on fake tensors, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch.spec import REGISTRY, Case, Op
from .audit_cases import case_of
from .launches import DEVICE, AtenCall, Gpu, Launch, Pointer, listed

SXM = Gpu("H100 SXM, H200", (9, 0), 132)
"""The GPU whose launches are listed where none is named."""


@dataclass(frozen=True)
class Row:
    """One pass of a benchmark case. pass_: "fwd", "train_fwd", "bwd" or "fwd+bwd"; kind: "kernel" or "wall"."""

    op: Op
    case: Case
    pass_: str
    kind: str = "kernel"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(op, case, dtype, pass): what the row's counts are looked up by."""
        return self.op.name, self.case.name, str(self.case.dtype).removeprefix("torch."), self.pass_

    def work(self) -> tuple[int, int]:
        """(bytes, FLOPs) that the pass needs at the least."""
        (fwd_bytes, bwd_bytes), (fwd_flops, bwd_flops) = self.op.bench.bytes(self.case), self.op.bench.flops(self.case)
        if self.pass_ == "bwd":
            return bwd_bytes, bwd_flops
        return (fwd_bytes + bwd_bytes, fwd_flops + bwd_flops) if self.pass_ == "fwd+bwd" else (fwd_bytes, fwd_flops)


def headline_rows() -> list[Row]:
    """Every op's headline cases and passes, the most valuable first."""
    ranked = [(headline, op) for op in REGISTRY.values() for headline in op.bench.headline]
    rows = []
    for headline, op in sorted(ranked, key=lambda pair: pair[0].rank):
        cases = {case.name: case for case in op.bench.cases() if case.dtype is headline.dtype}
        for name in headline.cases:
            for said in headline.passes:
                pass_, _, kind = said.partition(":")
                rows.append(Row(op, cases[name], pass_, kind or "kernel"))
    return rows


def launches_of(
    row: Row,
    gpu: Gpu = SXM,
    prepare: Callable[..., Callable[..., Any]] | None = None,
    noted: list[Launch | AtenCall] | None = None,
) -> list[Launch | AtenCall]:
    """What the pass launches: our kernels and ATen's, in order.

    prepare: gives, for the arguments, what is called in place of the op; its own launches are appended to noted by whoever sees
    them.
    """
    everything: list[Launch | AtenCall] = [] if noted is None else noted
    with listed(gpu, everything=everything):
        args, kwargs = row.case.make(DEVICE)
        call = row.op.public if prepare is None else prepare(args, kwargs)
        if row.pass_ == "fwd":
            del everything[:]
            with torch.no_grad():
                call(*args, **kwargs)
            return everything
        args, kwargs = tuple(map(_leaf, args)), {name: _leaf(value) for name, value in kwargs.items()}
        wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        del everything[:]
        outputs = call(*args, **kwargs)
        forward = len(everything)
        if row.pass_ != "train_fwd":
            outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
            dy = [torch.empty_like(y) for y in outputs]
            torch.autograd.grad(outputs, wanted, dy)
            del everything[: forward if row.pass_ == "bwd" else 0]
    return everything


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def counting_case(launch: Launch, gpu: Gpu = SXM) -> dict[str, Any]:
    """A launch as a case for kernels/aot.py whose machine code is to be counted. Its grid is of programs, not of clusters."""
    function = launch.function()
    values = dict(zip(function.arg_names, launch.args)) | dict(launch.options)
    tensors = {name: value for name, value in values.items() if isinstance(value, Pointer)}
    major, minor = gpu.capability
    own = ".kernels." in launch.module
    case = case_of(launch, 10 * major + minor)
    return case | {
        "peer": "" if own else launch.module,
        "launch": {
            "grid": launch.grid * case["num_ctas"],
            "values": {name: value for name, value in values.items() if type(value) in (int, float)},
            "bytes": {name: tensor.elements * tensor.dtype.itemsize for name, tensor in tensors.items()},
            "elements": max((tensor.elements for tensor in tensors.values()), default=0),
        },
    }
