"""Whether long rows run as clusters: several programs that share one row, where the GPU and Triton support it.

FUSED_OPS_CLUSTER=0 turns them off. A GPU that refuses a cluster, or a Triton that fails to compile one, runs none from then
on. `fused-ops tune` tries clusters like any other configuration, and drops those whose numbers break the contract.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..kernels.config import CLUSTER_CAPABILITIES, CLUSTER_TRITON, RowConfig, has_clusters
from . import settings
from .compiled import Planned
from .device import properties_of
from .notices import warn_once
from .plans import forget_plans, may_be_refused
from .tuned_kernels import KERNELS

_given_up: set[int] = set()


@functools.cache
def _triton() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def can_cluster(device: int) -> bool:
    """Whether a device can run clusters. device: a GPU's index, or -1 for the interpreter."""
    return device not in _given_up and has_clusters(properties_of(device)[0], _triton())


def give_up(device: int, error: Exception) -> None:
    """Run no clusters on a GPU from now on, because it refused one. Warns once."""
    _given_up.add(device)
    forget_plans()
    said = next(filter(None, str(error).splitlines()), "")
    warn_once("clusters", f"GPU {device} runs none ({type(error).__name__}: {said[:200]}); long rows are read twice instead")


def or_no_cluster(planned: Planned, plan_again: Callable[[], Planned]) -> Planned:
    """planned, a cluster's launch; where a GPU refuses it, plan_again() plans the launch of the same rows without clusters."""

    def instead(error: Exception) -> Planned:
        give_up(planned.device, error)
        return plan_again()

    return planned if planned.device < 0 else may_be_refused(planned, instead)


def clusters_wanted(device: int) -> bool:
    """Whether a configuration may be a cluster on a device. device: a GPU's index, or -1 for the interpreter."""
    return settings.CLUSTER and can_cluster(device)


def check_cluster(kernel: str, config: RowConfig, clusters: bool) -> None:
    """Raise ValueError unless the cluster config can launch kernel. clusters: whether the GPU and Triton run clusters."""
    if not clusters:
        gpus, (major, minor) = " or ".join(map(str, CLUSTER_CAPABILITIES)), CLUSTER_TRITON
        raise ValueError(
            f"num_ctas: got {config.num_ctas}, allowed: 1, for a cluster takes a GPU of compute capability {gpus} and"
            f" Triton {major}.{minor} or later"
        )
    if not KERNELS[kernel].clustered or config.chunked or config.block_m != 1:
        known = ", ".join(name for name, tuned in KERNELS.items() if tuned.clustered)
        raise ValueError(f"num_ctas: a cluster takes one whole row of {known}; got {kernel} with {config}")
