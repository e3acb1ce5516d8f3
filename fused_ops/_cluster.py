"""Whether long rows run as clusters of programs: where the GPU and Triton can, for rows that no single program holds.

FUSED_OPS_CLUSTER=0 keeps to chunks. A GPU that refuses a cluster, or a Triton that fails to compile one, runs none from then
on. `fused-ops tune` tries clusters as it tries everything: what gives other numbers than the contract allows is dropped.
"""

from __future__ import annotations

import functools
import os

from ._backend import TRUE_WORDS, note_fallback
from ._launch import facts_of, forget_plans
from .kernels.config import CLUSTER_CAPABILITIES, CLUSTER_CTAS, CLUSTER_TRITON, RowConfig, has_clusters

CLUSTERED = ("softmax_fwd", "softmax_bwd", "layer_norm_fwd")  # the kernels that run as clusters
MIN_TUNED = 32768  # columns of the shortest block that tuning tries clusters for
WANTED = os.environ.get("FUSED_OPS_CLUSTER", "1").lower() in TRUE_WORDS
_given_up: set[int] = set()


@functools.cache
def _triton() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def can_cluster(device: int) -> bool:
    """Whether kernels compile and run as clusters on a GPU, by index, or for the interpreter, -1."""
    return device not in _given_up and has_clusters(facts_of(device)[0], _triton())


def give_up(device: int, error: Exception) -> None:
    """Run no clusters on a GPU from now on, for it refused one; said once."""
    _given_up.add(device)
    forget_plans()
    said = next(filter(None, str(error).splitlines()), "")
    note_fallback(
        "clusters", f"GPU {device} runs none ({type(error).__name__}: {said[:200]}); long rows are read twice instead"
    )


def clusters_wanted(device: int) -> bool:
    """Whether the choosers may take clusters on a GPU, by index, or for the interpreter, -1."""
    return WANTED and can_cluster(device)


def check_cluster(kernel: str, config: RowConfig, clusters: bool) -> None:
    """Raise ValueError unless config, a cluster, can launch kernel. clusters: whether the GPU and Triton run them."""
    if not clusters:
        gpus, (major, minor) = " or ".join(map(str, CLUSTER_CAPABILITIES)), CLUSTER_TRITON
        raise ValueError(
            f"num_ctas: got {config.num_ctas}, allowed: 1, for a cluster takes a GPU of compute capability {gpus} and"
            f" Triton {major}.{minor} or later"
        )
    if kernel not in CLUSTERED or config.chunked or config.block_m != 1:
        raise ValueError(f"num_ctas: a cluster takes one whole row of {', '.join(CLUSTERED)}; got {kernel} with {config}")


def cluster_candidates(block_n: int, num_warps: int, values: int) -> list[RowConfig]:
    """The clusters that tuning tries for rows of up to block_n columns. values: rows that a program holds, of each its part."""
    found = []
    for num_ctas in (2, 4, CLUSTER_CTAS):
        per_thread = values * block_n // (32 * num_warps * num_ctas)
        for variant, most in (("one_pass", 64), ("packed", 128)):
            if block_n >= MIN_TUNED and num_warps >= 4 and 8 <= per_thread <= most:
                found.append(RowConfig(1, block_n, num_warps, variant, num_ctas=num_ctas))
    return found
