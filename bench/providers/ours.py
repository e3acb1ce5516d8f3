"""The public functions of fused_ops."""

from __future__ import annotations

from ._base import Prepared, Provider, Workload


class Ours(Provider):
    name = "ours"
    role = "ours"

    def available(self, device: str) -> str:
        return ""

    def prepare(self, work: Workload) -> Prepared:
        from fused_ops._spec import BACKEND, INTERPRET

        kernels = work.device.startswith("cuda") and BACKEND != "aten"
        return Prepared(work.spec.public, "triton" if kernels else "triton interpreter" if INTERPRET else "aten")
