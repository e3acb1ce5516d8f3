"""The bank conflicts that each kernel may have: of matrix loads and stores and asynchronous copies none, of others what is said here."""

from __future__ import annotations

from collections.abc import Iterable

import triton

from fused_ops.testing.ptx.gpu import Launch

OF_MATRICES = ("ldmatrix", "stmatrix", "cp.async")
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# Sums and maxima over the rows of a tile: until Triton 3.7 the partial results of a column's warps lie side by side, so that the
# columns of a warp's lanes are as many words apart as there are warps, times the columns of a lane: 32 in
# layer_norm_bwd_kernel's whole rows of 256 columns. From 3.8 on they are swizzled, and have no conflict; a tile of one row has none.
SUMS_OVER_ROWS = {
    "column_sum_kernel": 8.0,  # once a program, after its last step
    "gate_bwd_kernel": 1.5,
    "layer_norm_bwd_kernel": 12.15,
    "layer_norm_fp8_kernel": 4.0,  # of rows that lie apart: their results change threads, once a tile
    "layer_norm_fwd_kernel": 2.0,
    "linear_act_bwd_kernel": 1.5,
    "linear_dact_kernel": 1.15,
    "linear_dact_tma_kernel": 1.38,
    "norm_bwd_chunked_columns_kernel": 8.0,  # in a forced tile alone: a chosen one has no column in two threads
    "rms_norm_bwd_kernel": 4.54,
    "rms_norm_fwd_kernel": 2.0,
    "softmax_bwd_inner_kernel": 1.5,
    "softmax_bwd_kernel": 2.0,
    "softmax_fwd_inner_kernel": 1.5,
    "softmax_fwd_kernel": 2.0,
}
# Products of fp32 without TF32, which are no matrix instructions: the lanes of a warp read rows of the unswizzled tile of x,
# whose 32 columns are 128 bytes, all from one bank.
OF_FP32_FMA = 4.84


def _of_one_row(launch: Launch) -> bool:
    source = launch.compiled.src
    names = source.fn.arg_names
    return "BLOCK_M" in names and source.constants[(names.index("BLOCK_M"),)] == 1


def bound(launch: Launch) -> float:
    """The most wavefronts of shared memory that a launch may take, as a multiple of those without a conflict."""
    if launch.kernel == "linear_fwd_kernel" and not any(name in launch.compiled.asm["ptx"] for name in ("mma.", "mma_async")):
        return OF_FP32_FMA
    if launch.kernel in SUMS_OVER_ROWS and TRITON < (3, 8) and not _of_one_row(launch):
        return SUMS_OVER_ROWS[launch.kernel]
    return 1.0


def hold_to_banks(launches: Iterable[Launch]) -> None:
    """No launch has more bank conflicts than its kernel may have."""
    for launch in launches:
        taken, ideal = launch.traffic.shared.taken, launch.traffic.shared.ideal
        conflicts = {what: (n, ideal[what]) for what, n in taken.items() if n != ideal[what]}
        assert not [what for what in conflicts if any(name in what for name in OF_MATRICES)], (launch.kernel, conflicts)
        assert launch.traffic.shared_wavefronts <= bound(launch) * launch.traffic.shared_ideal, (launch.kernel, conflicts)
