"""The public functions of fused_ops."""

from __future__ import annotations

import functools
from dataclasses import replace

from ..provider import Prepared, Provider, Unsupported, Workload


class Ours(Provider):
    name = "ours"
    role = "ours"

    def available(self, device: str) -> str:
        return ""

    def prepare(self, work: Workload) -> Prepared:
        from fused_ops._runtime.settings import BACKEND, INTERPRET

        kernels = work.device.startswith("cuda") and BACKEND != "aten"
        return Prepared(work.spec.public, "triton" if kernels else "triton interpreter" if INTERPRET else "aten")


class OursRecompute(Ours):
    """fused_mlp(recompute=True): less memory for a little more time."""

    name = "ours+recompute"

    def prepare(self, work: Workload) -> Prepared:
        if work.op != "mlp" or not work.trains:
            raise Unsupported("fused_mlp in training only")
        prepared = super().prepare(work)
        return replace(prepared, call=functools.partial(prepared.call, recompute=True))
