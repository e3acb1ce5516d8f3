"""The kernels that Inductor makes of a function, and the bytes they move: counted after its fusion, before code is generated.

A kernel of Inductor's, a product of ATen's and each launch of our operators (as on a GPU) count as one. Bytes are what each reads
and writes, by Inductor's own account, which counts a buffer once a kernel.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import compile_fx, ir, scheduler

from fused_ops import REGISTRY
from fused_ops._torch.compile_choice import Cost, kernels_of


class _CountedError(Exception):
    """Ends a compilation that has been counted."""


def _launches(node: ir.ExternKernel) -> int:
    raw = next((raw for op in REGISTRY.values() for raw in op.raw if raw.overload is getattr(node, "op_overload", None)), None)
    if raw is None:
        return 1
    args, _ = node.unflatten_args(node.inputs, node.constant_args)  # type: ignore[attr-defined]
    return kernels_of(raw, tuple(args))


def _counted(nodes: Any) -> Cost:
    kernels = moved = 0
    for node in nodes:
        inner = getattr(node, "node", None)
        if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(inner, ir.MultiOutput):
            continue
        kernels += _launches(inner) if isinstance(inner, ir.FallbackKernel) else 1
        moved += node.get_read_write_buffers_sizes()
    return Cost(int(kernels), int(moved))


@contextlib.contextmanager
def _stopping(found: list[Cost]) -> Iterator[None]:
    def codegen(self: Any) -> None:
        found.append(_counted(self.nodes))
        raise _CountedError

    with mock.patch.object(scheduler.Scheduler, "codegen", codegen):
        yield


def costs(function: Callable[..., Any], *args: Any, train: bool = False) -> list[Cost]:
    """What each graph of function(*args) costs, the forward's first. train: with the backward of the results' sum of squares."""
    found: list[Cost] = []

    def inner(graph: torch.fx.GraphModule, example: Any, **kwargs: Any) -> Any:
        before = len(found)
        try:
            with _stopping(found):
                compile_fx.compile_fx_inner(copy.deepcopy(graph), example, **kwargs)
        except Exception:  # _CountedError, as Inductor wraps it: what has been counted need not be compiled
            if len(found) == before:
                raise
        return graph

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True, fallback_random=True):
        compiled = torch.compile(
            function, fullgraph=True, backend=lambda g, e: compile_fx.compile_fx(g, e, inner_compile=inner)
        )
        with torch.set_grad_enabled(train):
            out = compiled(*args)
            if train:
                loss = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
                loss.backward()
    return found
